"""Structured removal: quality of models that became smaller and stayed dense, on real data, and their speed in plain PyTorch.

    python benchmarks/structured.py --brown FOLDER [--model mpnet smollm2 efficientnet] [--methods ...] [--density 0.75] [--json FILE]
    python benchmarks/structured.py --brown FOLDER --speed [--only-speed] [--model mpnet smollm2] [--methods ...] [--forms "eager fp32" ...]

Models, data and measures as in prune_quality.py: SmolLM2, MPNet, and EfficientNet-lite0, whose filters are removed.

Speed: the same form of the dense and of the smaller model, interleaved in one process: eager and torch.compile, float32 and bfloat16; MPNet on 8 ×
128 tokens, SmolLM2 on 512. Every model that is timed is one that was saved, loaded again, and gave the same outputs.
"""

from __future__ import annotations

import argparse
import copy
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
from subjects import MPNet, Subject
from torch import nn

from sparsify_compiler import recipes
from sparsify_compiler.artefact import load
from sparsify_compiler.call import instantiate
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.measure import interleave
from sparsify_compiler.passes.prune.recalibrate_batchnorm import RecalibrateBatchnorm
from sparsify_compiler.passes.prune.remove_channels import RemoveChannels
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program


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
        subject = SUBJECTS[name](arguments)
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
        yield from speeds(name, models, subject.timed if isinstance(subject, MPNet) else subject.batches[0], arguments.forms)


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
