"""A step of training, forward, backward and update, of one linear layer whose weight is packed, against the dense layer of torch in the same process.

    python benchmarks/training_step.py [--shapes 1024x1024 ...] [--rows 128] [--densities 0.1 0.05] [--structures unstructured ...] [--json FILE]

All in float32, the gradient of the input included, AdamW fused in every form. Rivals: torch eager, torch.compile of forward and backward, and the
weight times its mask, which is how sparse training usually runs. Forms take turns; a cell is the fastest dense median over ours. Bytes are of weight
or values, their gradient, AdamW's two moments, and the indices, those that only the backward pass needs too, over the four of the dense layer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.measure import Timing, interleave
from sparsify_compiler.packed import Packed

STRUCTURES = ("unstructured", "fan_in", "4x1", "16x1", "32x1")
DENSE = ("dense eager", "dense compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1024x1024", "4096x1024", "1024x4096"], help="out x in")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.05])
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [row for shape in arguments.shapes for row in measured(shape, arguments)]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    show(rows, arguments.rows)


def measured(shape: str, arguments: Any) -> list[dict[str, Any]]:
    """All forms of one layer, in turns."""
    outputs, inputs = (int(size) for size in shape.split("x"))
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, dtype=torch.float32).eval()
    x = torch.randn(arguments.rows, inputs, dtype=torch.float32, requires_grad=True)
    gradient = torch.randn(arguments.rows, outputs, dtype=torch.float32)
    modules: dict[str, nn.Module] = {"dense eager": layer, "dense compiled": torch.compile(layer)}
    for density in arguments.densities:
        for structure in arguments.structures:
            mask = f"mask_weights(score='random', structure={structure!r}, density={density})"
            modules[f"{structure} {density}"] = sc.attach(layer, (x.detach(),), f"{mask} | pack()")[0]
        modules[f"masked {density}"] = sc.attach(layer, (x.detach(),), mask)[0]
    timings = interleave({name: step_of(module, x, gradient) for name, module in modules.items()}, rounds=arguments.rounds, at_most=12.0)
    whole = bytes_of(layer)
    return [row(shape, name, module, timings, bytes_of(module) / whole) for name, module in modules.items() if name not in DENSE]


def step_of(module: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(module.parameters(), 1e-4, fused=True)

    def step() -> None:
        module(x).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    step()
    return step


def bytes_of(module: nn.Module) -> int:
    """Of parameters, gradients, two moments, and what is kept beside them."""
    beside = sum(part.index_bytes for part in module.modules() if isinstance(part, Packed))
    buffers = sum(tensor.numel() * tensor.element_size() for tensor in module.buffers())
    return sum(4 * tensor.numel() * tensor.element_size() for tensor in module.parameters()) + buffers + beside


def row(shape: str, name: str, module: nn.Module, timings: dict[str, Timing], share: float) -> dict[str, Any]:
    structure, density = name.split()
    best = min(DENSE, key=lambda form: timings[form].median)
    ours = timings[name]
    return {"shape": shape, "structure": structure, "density": float(density), "ms": ours.median, "low": ours.low, "high": ours.high, "dense": best,
            "dense ms": timings[best].median, "eager ms": timings["dense eager"].median, "ratio": timings[best].median / ours.median, "bytes": share}


def show(rows: list[dict[str, Any]], count: int) -> None:
    table = Table(title=f"A step of training, {count} rows, {torch.get_num_threads()} threads")
    for name in ("out x in", "structure", "density", "ms", "quartiles", "fastest dense", "ms ", "ratio", "bytes"):
        table.add_column(name, justify="left" if name in ("out x in", "structure", "fastest dense") else "right")
    for one in rows:
        table.add_row(one["shape"], one["structure"], f"{one['density']:g}", f"{one['ms']:.2f}", f"{one['low']:.2f}-{one['high']:.2f}", one["dense"],
                      f"{one['dense ms']:.2f}", f"{one['ratio']:.2f}", f"{one['bytes']:.3f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
