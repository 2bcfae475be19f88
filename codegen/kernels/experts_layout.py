"""The weights of experts as kernels take them: matrices in which an expert's rows lie one after the other, where the model holds them.

gate and up may be views of one tensor [E, 2H, K]: the rows of an expert then begin `step` rows apart, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.products import LANES
from sparsify_compiler.codegen.laid import PreparedTensors

WEIGHTS, BIASES = ("gate", "up", "down"), ("gate_bias", "up_bias", "bias")


@dataclass(frozen=True)
class ExpertsLayout:
    """Static facts: dtype of x, weights and y; is there an up; which biases there are."""

    dtype: str       # "float32" or "bfloat16"
    activation: str
    gated: bool
    biased: tuple[str, ...] = ()  # of BIASES


def prepare_experts(tensors: Mapping[str, Tensor], activation: str) -> PreparedTensors:
    """gate and up [E, H, K], down [E, N, H], biases [E, H], [E, H], [E, N] as kernels read them: `sizes`, the weights, the biases.

    A weight is copied only where its rows are not whole and in order.
    """
    matrices = {name: _rows(tensors[name]) for name in WEIGHTS if name in tensors}
    steps = {name: step for name, (_, step) in matrices.items()}
    gate, down = tensors["gate"], tensors["down"]
    sizes = torch.tensor([gate.shape[0], steps["gate"], steps.get("up", 0), steps["down"], gate.shape[1]], dtype=torch.int32)
    biases = {name: torch.nn.functional.pad(tensors[name].detach().float().flatten(), (0, 2 * LANES)) for name in BIASES if name in tensors}
    layout = ExpertsLayout(str(gate.dtype).removeprefix("torch."), activation, "up" in tensors, tuple(biases))
    words = {name: rows if gate.dtype is torch.float32 else rows.view(torch.int32) for name, (rows, _) in matrices.items()}
    return PreparedTensors(layout, {"sizes": sizes, **words, **biases}, tensors, down.shape[1], gate.shape[2])


def _rows(weight: Tensor) -> tuple[Tensor, int]:
    """A matrix of all rows of [E, H, K], without a copy where that can be, and how many rows lie between two experts' first ones."""
    weight = weight.detach()
    experts, rows, inputs = weight.shape
    between = weight.stride(0)
    whole = weight.stride(2) == 1 and weight.stride(1) == inputs and between % inputs == 0 and between >= rows * inputs
    if not whole and experts > 1:
        weight, between = weight.contiguous(), rows * inputs
    elif not whole:
        weight = weight.contiguous()
    step = between // inputs if experts > 1 else rows
    return torch.as_strided(weight, ((experts - 1) * step + rows, inputs), (inputs, 1)), step


class ExpertsArguments:
    """The parameters f(x [M, K], chosen, weights [M, k], sizes [5], gate, up, down, the biases, y [M, N]).

    chosen  int32 words [M, k], or [M, 2k] of int64, whose lower halves come first
    sizes   experts; rows from one expert's first row to the next one's in gate, up and down; H
    weights of bfloat16 come as int32 words of two: [rows, K / 2]
    """

    def __init__(self, how: ExpertsLayout) -> None:
        self.M, self.N, self.K, self.k, words = (e.int32() for _ in range(5))
        kind = "float32" if how.dtype == "float32" else "int32"
        self.x = e.argument((self.M, self.K), how.dtype)
        self._chosen = e.argument((self.M, words), "int32")
        self.weights = e.argument((self.M, self.k), "float32")
        sizes = e.argument((5,), "int32")
        weights = {name: e.argument((e.int32(), e.int32()), kind) for name in WEIGHTS if how.gated or name != "up"}
        self.biases: Mapping[str, Any] = {name: e.argument((e.int32(),), "float32") for name in how.biased}
        self.y = e.argument((self.M, self.N), how.dtype)
        self.experts, *steps, self.H = (e.let(e.load(sizes, i)) for i in range(5))
        self.projections = {name: (weights[name], step) for name, step in zip(WEIGHTS, steps, strict=True) if name in weights}
        self._step = e.let(e.floordiv(words, e.maximum(self.k, 1)))

    def expert(self, m: Any, place: Any) -> Any:
        """What row m chose at a place."""
        return e.load(self._chosen, m, place * self._step)

    def exists(self, expert: Any) -> Any:
        """Is it one of the experts? -1 is none."""
        return e.both(expert >= 0, expert < self.experts)

    def rows(self, name: str, expert: Any, first: Any, count: int, last: Any) -> list[Any]:
        """The places in a weight's matrix of `count` rows of an expert from `first` on; behind the last one it is taken again."""
        start = e.let(e.wide(expert) * e.wide(self.projections[name][1]))
        return [start + e.minimum(first + i, last) for i in range(count)]
