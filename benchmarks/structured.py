"""Structured removal: quality of models that became smaller and stayed dense, on real data, and their speed in plain PyTorch.

    python benchmarks/structured.py --brown FOLDER [--model mpnet smollm2 efficientnet] [--methods ...] [--density 0.75] [--json FILE]
    python benchmarks/structured.py --brown FOLDER --keep FOLDER --only-speed [--model mpnet smollm2] [--methods ...] [--forms "eager fp32" ...]

Models, data and measures as in prune_quality.py: SmolLM2, MPNet, and EfficientNet-lite0, whose filters are removed. Every model that is measured was
saved, loaded again, and gave the same outputs; --keep keeps them, so that a run that times them need not make them.

Speed: the same form of the dense and of the smaller model, interleaved in one process: eager and torch.compile, float32 and bfloat16; MPNet on 8 ×
128 tokens, SmolLM2 on 512. The dense model also as it was captured, which calls less Python; the faster of the two counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from prune_quality import SUBJECTS
from rich.console import Console
from rich.table import Table
from subjects import MPNet, Subject, options
from torch import nn

from sparsify_compiler import recipes
from sparsify_compiler.artefact import load
from sparsify_compiler.call import instantiate
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.measure import interleave
from sparsify_compiler.passes.prune.recalibrate_batchnorm import RecalibrateBatchnorm
from sparsify_compiler.passes.prune.remove_channels import RemoveChannels
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.yardstick import dense_forms


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
    "filters": lambda d: remove("weight_times_input_norm", d, "least_squares", targets=("filters",)),
    "filters, BN": lambda d: remove("weight_times_input_norm", d, targets=("filters",)) | RecalibrateBatchnorm(),
    "filters, least squares, BN": lambda d: remove("weight_times_input_norm", d, "least_squares", targets=("filters",)) | RecalibrateBatchnorm(),
}
OF = {"efficientnet": tuple(name for name in METHODS if name.startswith("filters")),
      "mpnet": ("random", "magnitude", "taylor", "wanda", "wanda, bias", "wanda, least squares", "wanda, global, least squares"),
      "smollm2": ("wanda, least squares", "neurons, least squares", "cfsp", "slicegpt", "slicegpt, untied", "slicegpt, one basis")}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--density", type=float, default=0.75)
    parser.add_argument("--model", nargs="+", choices=list(OF), default=list(OF))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--only-speed", action="store_true")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = []
    for name in arguments.model:
        subject = SUBJECTS[name](arguments)
        for row in measured(name, subject, arguments):
            rows.append(row)
            Console(stderr=True).print(" ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=2))
    show(rows)


def measured(name: str, subject: Subject, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of quality, of the dense model and of each method, and then of their speed, if that is asked for."""
    models, dense = {"dense": subject.model, "dense, captured": instantiate(subject.captured)}, parameters(subject.model)
    if not arguments.only_speed:
        yield {"model": name, "method": "dense", "parameters": 1.0, **subject.measure(subject.model), "seconds": 0.0}
    for method in arguments.methods or OF[name]:
        with tempfile.TemporaryDirectory() as folder:
            place = (arguments.keep or Path(folder)) / f"{name}, {method}, {arguments.density:g}"
            seconds = 0.0 if place.exists() else make(subject, METHODS[method](arguments.density), place)
            models[method] = instantiate(load(place).program)
        if not arguments.only_speed:
            share = parameters(models[method]) / dense
            yield {"model": name, "method": method, "parameters": share, **subject.measure(models[method]), "seconds": seconds}
    if arguments.speed or arguments.only_speed:
        yield from speeds(name, models, subject.timed if isinstance(subject, MPNet) else subject.batches[0], arguments)


def make(subject: Subject, pipeline: Pipeline, place: Path) -> float:
    """Save the smaller model, and see that it is the same when it is loaded again. Returns the seconds of pruning."""
    start = time.perf_counter()
    made = subject.prune(pipeline)
    seconds = time.perf_counter() - start
    CompiledModel(made).save(place)
    both = (instantiate(program)(**subject.batches[0]) for program in (made, load(place).program))
    for one, other in zip(*map(torch.utils._pytree.tree_leaves, both), strict=True):
        assert torch.equal(one, other)
    return seconds


def speeds(name: str, models: dict[str, nn.Module], example: dict[str, Any], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for form in arguments.forms:
        calls = {method: FORMS[form](model, example) for method, model in models.items()}
        timings = interleave(calls, rounds=arguments.rounds, warmup=1, at_most=12.0)
        best = min(timings["dense"].median, timings["dense, captured"].median)
        for method, timing in timings.items():
            yield {"model": name, "form": form, "method": method, "ms": timing.median, "low": timing.low, "high": timing.high,
                   "best dense / this": best / timing.median}


def form(dtype: torch.dtype, name: str) -> Callable[[nn.Module, dict[str, Any]], Callable[[], Any]]:
    """torch's own "eager" or "compile", with frozen weights; bfloat16 by autocast, which casts frozen weights once and others in every call."""

    def make(model: nn.Module, example: dict[str, Any]) -> Callable[[], Any]:
        def cast() -> torch.autocast:
            return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)

        with torch.no_grad(), cast():
            run = next(iter(dense_forms(model, (), example, [name])[0].values()))

        def call() -> Any:
            with torch.no_grad(), cast():
                return run()

        return call

    return make


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMS = {f"{name} {short}": form(dtype, name) for name in ("eager", "compile") for short, dtype in DTYPES.items()}


def parameters(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in {tensor.data_ptr(): tensor for tensor in model.parameters()}.values())


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
