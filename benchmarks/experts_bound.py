"""What bounds a mixture of experts whose experts have few rows each: the lanes that are empty, the weights that come from memory, or the products.

    python benchmarks/experts.py --build
    python benchmarks/experts_bound.py --experts 64 --width 1024 --dtype fp32 [--tokens 1024]

Our kernel on the same weights in four cases, interleaved; the dense FFN is one of the same FLOPs. "rate" is of the dense FFN's, by the rows that
there are; "by lanes" by those that are multiplied, whole registers of 16.

    random    every row takes two experts at random: what a model does
    even      every expert has as many rows as the others, a multiple of 16: no lane is empty
    hot       as even, but all experts are one and the same in memory, which stays in a cache: no weight comes from memory
    hot, random    as random, in that memory
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from experts import DTYPES, TOP, experts_of, forms, ours
from rich.console import Console
from rich.table import Table
from torch import Tensor

LANES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--seconds", type=float, default=15.0)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    mixture = experts_of(arguments.experts, arguments.width, arguments.hidden, DTYPES[arguments.dtype])
    dense = forms(mixture, arguments.tokens)["dense"]
    x = torch.randn(arguments.tokens, arguments.width, dtype=torch.float32).to(DTYPES[arguments.dtype])
    weights = torch.rand(arguments.tokens, TOP, dtype=torch.float32)
    choices = {"random": at_random(arguments.experts, arguments.tokens), "even": evenly(arguments.experts, arguments.tokens)}
    kernel, hot = ours(mixture), hot_of(mixture)
    cases: dict[str, tuple[Callable[..., object], Tensor]] = {
        "random": (kernel, choices["random"]), "even": (kernel, choices["even"]), "hot": (hot, choices["even"]),
        "hot, random": (hot, choices["random"])}
    found: dict[str, list[float]] = {name: [] for name in ("dense", *cases)}
    end = time.perf_counter() + arguments.seconds
    while len(found["dense"]) < 3 or time.perf_counter() < end:
        for name in found:
            call, chosen = cases.get(name, (dense, choices["even"]))
            start = time.perf_counter()
            call(x, chosen, weights)
            found[name].append((time.perf_counter() - start) * 1e3)
    show(arguments, found, {name: chosen for name, (_, chosen) in cases.items()})


def at_random(experts: int, tokens: int) -> Tensor:
    return torch.rand(tokens, experts, dtype=torch.float32).topk(TOP).indices


def evenly(experts: int, tokens: int) -> Tensor:
    """Two different experts for each row, all alike often."""
    first = torch.arange(tokens) % experts
    return torch.stack([first, (first + experts // 2) % experts], 1)


def hot_of(mixture: Any) -> Any:
    """The kernel with the first expert's weights, in one place, for all: no expert's rows lie behind another's."""
    class First:
        gate_up_proj, down_proj = mixture.gate_up_proj[:1], mixture.down_proj[:1]

    kernel = ours(First)
    sizes = kernel.laid.prepared.arguments()["sizes"]
    sizes[0], sizes[1:4] = mixture.gate_up_proj.shape[0], 0
    return kernel


def show(arguments: argparse.Namespace, found: dict[str, list[float]], choices: dict[str, Tensor]) -> None:
    table = Table(title=f"{arguments.experts} experts, width {arguments.width}, {arguments.tokens} tokens, {arguments.dtype}; "
                        f"dense {statistics.median(found['dense']):.2f} ms")
    for name in ("case", "ms", "rows in lanes", "rate", "by lanes"):
        table.add_column(name, justify="right")
    for name, chosen in choices.items():
        rows = torch.bincount(chosen.flatten(), minlength=arguments.experts)
        lanes = float(rows.sum() / ((rows + LANES - 1) // LANES * LANES).sum())
        rate = statistics.median(a / b for a, b in zip(found["dense"], found[name], strict=True))
        table.add_row(name, f"{statistics.median(found[name]):.2f}", f"{lanes:.2f}", f"{rate:.2f}", f"{rate / lanes:.2f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
