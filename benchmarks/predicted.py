"""Speed of FFNs whose neurons a small network chooses, predictor included, against the fastest dense form, on weights that come from memory.

    python benchmarks/predicted.py [--shapes 2048x8192 ...] [--dtypes fp32 bf16] [--rank 128] [--build]

A shape is inputs × hidden of a gated FFN, one row of x. Every form runs over as many FFNs in turn as fill --megabytes. "of ideal" is the gain over
the fastest dense form (torch's own, packed by oneDNN) divided by 1 / (1 - skipped + predictor / FFN), both by their weights. --build compiles the
kernels and leaves.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gather import DTYPES, ROUNDS, bound
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear, silu

from sparsify_compiler.codegen import runtime
from sparsify_compiler.passes.activation._predictor import hidden, scored
from sparsify_compiler.target import host

SKIPPED = (0.0, 0.5, 0.7, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["576x1536", "2048x8192", "4096x11008"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--megabytes", type=int, default=640)
    parser.add_argument("--build", action="store_true")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    table = Table(title=f"{torch.get_num_threads()} threads, rank {arguments.rank}; gain over the fastest dense form (of ideal)")
    for column in ("FFN", "dtype", "eager ms", "packed ms", "predictor", *(f"{100 * s:.0f} %" for s in SKIPPED)):
        table.add_column(column, justify="right")
    for shape in arguments.shapes:
        for dtype in arguments.dtypes:
            inputs, neurons = map(int, shape.split("x"))
            ffns = Ffns(inputs, neurons, arguments.rank, DTYPES[dtype], 0 if arguments.build else arguments.megabytes << 20)
            if not arguments.build:
                table.add_row(shape, dtype, *ffns.row())
    Console(width=130).print(table)


class Ffns:
    """Equal gated FFNs with weights of their own, in every form."""

    def __init__(self, inputs: int, neurons: int, rank: int, dtype: torch.dtype, room: int) -> None:
        self.x = torch.randn(1, inputs).to(dtype)
        self.share = rank * (inputs + neurons) / (3 * inputs * neurons)  # of the FFN's weights, the predictor's
        self.limits = {skipped: torch.full((1, 1), skipped, dtype=torch.float32) for skipped in SKIPPED}
        self.scores = torch.rand(1, neurons)
        self.forms: dict[str, list[Callable[..., Tensor]]] = {"eager": [], "packed": [], "predictor": [], "chosen": []}
        for _ in range(max(2, room // (3 * inputs * neurons * dtype.itemsize))):
            self._add({"gate": torch.randn(neurons, inputs).to(dtype), "up": torch.randn(neurons, inputs).to(dtype),
                       "down": torch.randn(neurons, inputs).to(dtype)}, rank, dtype)

    def _add(self, weights: dict[str, Tensor], rank: int, dtype: torch.dtype) -> None:
        neurons, inputs = weights["gate"].shape
        dense = weights | {"down": weights["down"].t().contiguous()}
        packed = {name: bound("linear", {"weight": weight}, dtype) for name, weight in dense.items()}
        first, second = torch.randn(rank, inputs).to(dtype), torch.randn(neurons, rank).to(dtype)
        biases = torch.zeros(rank).to(dtype), torch.zeros(neurons).to(dtype)
        kernel = runtime.candidates("predicted_ffn", weights, {"activation": "silu"}, dtype, (1,), host())[0].bind()
        self.forms["eager"].append(lambda x: linear(silu(linear(x, dense["gate"])) * linear(x, dense["up"]), dense["down"]))
        self.forms["packed"].append(lambda x: packed["down"](silu(packed["gate"](x)) * packed["up"](x)))
        self.forms["predictor"].append(lambda x: scored(hidden(x, first, biases[0]), second, biases[1]))
        self.forms["chosen"].append(kernel)

    def row(self) -> Iterator[str]:
        """What the table says of them."""
        cells: list[tuple[str, float]] = [("eager", 0.0), ("packed", 0.0), ("predictor", 0.0), *(("chosen", skipped) for skipped in SKIPPED)]
        times: dict[tuple[str, float], list[float]] = {cell: [] for cell in cells}
        for _ in range(ROUNDS):
            for name, skipped in cells:
                given: tuple[Any, ...] = (self.scores, self.limits[skipped]) if name == "chosen" else ()
                start = time.perf_counter()
                for form in self.forms[name]:
                    form(self.x, *given)
                times[name, skipped].append((time.perf_counter() - start) * 1e3 / len(self.forms[name]))
        found = {cell: statistics.median(values[1:]) for cell, values in times.items()}
        dense, predictor = min(found["eager", 0.0], found["packed", 0.0]), found["predictor", 0.0]
        yield from (f"{found[name, 0.0]:.3f}" for name in ("eager", "packed"))
        yield f"{predictor:.3f}"
        for skipped in SKIPPED:
            gain = dense / (found["chosen", skipped] + predictor)
            yield f"{gain:.2f} ({100 * gain * (1 - skipped + self.share):.0f} %)"


if __name__ == "__main__":
    main()
