"""What partitions, routers and repairs are told of an FFN: its weights, and what it does on the rows of calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.ops.select_ffn import hidden
from sparsify_compiler.passes.activation._predictor import top


@dataclass(frozen=True)
class Ffn:
    """y = down hidden(gate x + gate_bias, up x + up_bias) + bias, of H neurons: gate and up [H, K], down [N, H], gate_bias and up_bias [H], bias [N].

    up is None for an FFN without a gate. activation: a name of ops/select_ffn.ACTIVATIONS
    """

    gate: Tensor
    down: Tensor
    activation: str
    up: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    bias: Tensor | None = None

    @property
    def neurons(self) -> int:
        """H."""
        return self.gate.shape[0]

    def hidden(self, x: Tensor) -> Tensor:
        """What down reads: [..., K] -> [..., H]."""
        return hidden(self.activation, linear(x, self.gate, self.gate_bias), None if self.up is None else linear(x, self.up, self.up_bias))

    def float(self) -> Ffn:
        """The same in float32."""
        return replace(self, **{name: value.float() for name, value in vars(self).items() if isinstance(value, Tensor)})  # type: ignore[arg-type]

    def part(self, table: Tensor) -> dict[str, Tensor]:
        """The weights of these neurons, int64 [...]: gate and up [..., K], down [N, ...], gate_bias and up_bias [...]. -1 is a neuron of zeros."""
        parts = {name: take(value, table, 0) for name in ("gate", "up", "gate_bias", "up_bias") if (value := getattr(self, name)) is not None}
        return parts | {"down": take(self.down, table, 1)}


def take(weight: Tensor, table: Tensor, dim: int) -> Tensor:
    """weight.index_select for a table of any shape, whose -1 gives zeros: the dimension becomes those of the table. Contiguous."""
    flat = table.flatten()
    found = weight.index_select(dim, flat.clamp_min(0))
    shape = [1] * weight.dim()
    shape[dim] = -1
    found = found.masked_fill((flat < 0).view(shape), 0)
    return found.reshape(*weight.shape[:dim], *table.shape, *weight.shape[dim + 1 :])


@dataclass(frozen=True)
class Evidence:
    """An FFN in float32, and what calibration saw of it, R rows: x [R, K], neurons [R, H], which down reads, and the slopes of the loss by those.

    R is 0 where nobody asked for rows; slopes are None where nobody asked for them.
    """

    ffn: Ffn
    x: Tensor
    neurons: Tensor
    slopes: Tensor | None = None
    seed: int = 0
    where: str = ""
    memo: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def lengths(self) -> Tensor:
        """float32 [H]: the length of what a neuron of 1 adds to the output."""
        return self.ffn.down.square().sum(0).sqrt()

    @property
    def rows(self) -> int:
        """R."""
        return self.x.shape[0]

    def active(self, share: float) -> Tensor:
        """bool [R, H]: the largest neurons of each row, at least one, and none that is 0."""
        size = self.neurons.abs()
        return top(size, share) & (size > 0)

    def needed_slopes(self) -> Tensor:
        """The slopes. Raises CalibrationError where there are none."""
        if self.slopes is None:
            raise CalibrationError("the gradient by its neurons was not gathered", where=self.where)
        return self.slopes

    def generator(self) -> torch.Generator:
        """Random numbers that depend on the seed alone."""
        return torch.Generator().manual_seed(self.seed)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gave when it was first asked for."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


@dataclass(frozen=True)
class Formula:
    """A part of the graph to be: `function(**inputs, **tensors, **buffers)`, in plain torch. Tensors become parameters, which train; buffers do not.

    An argument of the function that is none of these names one of the experts' own tensors: gate, up, down, gate_bias, up_bias.
    """

    tensors: Mapping[str, Tensor]
    function: Callable[..., Any]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
