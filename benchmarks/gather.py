"""Speed of layers that select their inputs, against the fastest dense form of the same layer, interleaved, on weights that come from memory.

    python benchmarks/gather.py [--shapes 2048x2048 ...] [--dtypes fp32 bf16] [--rows 1 2 ...] [--build]

A shape is inputs × outputs. Every form runs over as many layers in turn as fill --megabytes: take more than the last cache holds, or the gathered
form, which is timed several times in a row, finds its weights there and the dense ones do not. "of ideal" is the gain over the fastest dense form
(torch's own, packed by oneDNN) divided by 1 / (1 - skipped). "selector" is the time of a call that skips everything, as a share of the dense
layer's: selecting, and calling at all. --build compiles the kernels and leaves. With several --rows each row selects inputs of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.codegen import runtime
from sparsify_compiler.codegen.kernels import gather
from sparsify_compiler.target import host

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SKIPPED = (0.0, 0.5, 0.7, 0.9, 1.0)
ROUNDS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "4096x4096", "2048x8192", "8192x2048"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1])
    parser.add_argument("--megabytes", type=int, default=640)
    parser.add_argument("--build", action="store_true")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    gather.FEW_ROWS = dict.fromkeys(gather.FEW_ROWS, max(arguments.rows))  # measure the kernel beyond where it hands over to the dense form
    table = Table(title=f"{torch.get_num_threads()} threads; gain over the fastest dense form (of ideal)")
    for column in ("layer", "dtype", "rows", "eager ms", "packed ms", *(f"{100 * s:.0f} %" for s in SKIPPED[:-1]), "selector"):
        table.add_column(column, justify="right")
    for shape in arguments.shapes:
        for dtype in arguments.dtypes:
            layers = Layers(*map(int, shape.split("x")), DTYPES[dtype], arguments.megabytes << 20, arguments.build)
            for rows in [] if arguments.build else arguments.rows:
                table.add_row(shape, dtype, str(rows), *layers.row(rows))
    Console(width=130).print(table)


class Layers:
    """Equal layers with weights of their own, in every form."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, room: int, build: bool) -> None:
        self.inputs, self.dtype = inputs, dtype
        count = 1 if build else max(2, room // (inputs * outputs * dtype.itemsize))
        weights = [torch.randn(inputs, outputs).to(dtype) for _ in range(count)]
        self.forms: dict[str, list[Callable[[Tensor], Tensor]]] = {"eager": [], "packed": [], "gather": []}
        for weight in weights:
            dense = weight.t().contiguous()
            self.forms["eager"].append(lambda x, dense=dense: linear(x, dense))
            self.forms["packed"].append(bound("linear", {"weight": dense}, dtype))
            self.forms["gather"].append(bound("select_linear", {"weight": weight, "limit": torch.tensor(0.5)}, dtype))

    def row(self, rows: int) -> Iterator[str]:
        """What the table says of this number of rows."""
        x = {skipped: self.example(rows, skipped) for skipped in SKIPPED}
        cells: list[tuple[str, float]] = [("eager", 0.0), ("packed", 0.0), *(("gather", skipped) for skipped in SKIPPED)]
        times: dict[tuple[str, float], list[float]] = {cell: [] for cell in cells}
        for _ in range(ROUNDS):
            for name, skipped in cells:
                start = time.perf_counter()
                for form in self.forms[name]:
                    form(x[skipped])
                times[name, skipped].append((time.perf_counter() - start) * 1e3 / len(self.forms[name]))
        found = {cell: statistics.median(values[1:]) for cell, values in times.items()}
        dense = min(found["eager", 0.0], found["packed", 0.0])
        yield from (f"{found[name, 0.0]:.3f}" for name in ("eager", "packed"))
        for skipped in SKIPPED[:-1]:
            gain = dense / found["gather", skipped]
            yield f"{gain:.2f} ({100 * gain * (1 - skipped):.0f} %)"
        yield f"{100 * found['gather', 1.0] / dense:.1f} %"

    def example(self, rows: int, skipped: float) -> Tensor:
        """Rows of which each skips this share of the inputs, each its own."""
        x = torch.ones(rows, self.inputs)
        for row in x:
            row[torch.randperm(self.inputs)[: round(skipped * self.inputs)]] = 0.1
        return (x * torch.randn(rows, self.inputs).sign()).to(self.dtype)


def bound(op: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """The first kernel that there is."""
    return runtime.candidates(op, tensors, {}, dtype, (1,), host())[0].bind()


if __name__ == "__main__":
    main()
