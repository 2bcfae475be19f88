"""Mixtures of experts by torch's own grouped product, on the weights as they lie: what kernels have to beat, and what runs where there are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from sparsify_compiler.codegen.bound import BoundLayer
from sparsify_compiler.codegen.kernels.layout import DTYPES
from sparsify_compiler.errors import KernelError
from sparsify_compiler.ops import select_ffn
from sparsify_compiler.target import Target

NAME, OP, LABEL = "experts_torch", "experts_ffn", "torch grouped_mm"
ALIGNED = 16  # bytes that an expert's row is a multiple of


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the form, where all weights have the dtype of x."""
    weights = [tensors[name] for name in ("gate", "up", "down") if name in tensors]
    fits = op == OP and dtype in DTYPES and all(weight.dtype is dtype and weight.dim() == 3 and min(weight.shape) > 0 for weight in weights)
    fits = fits and all(weight.stride(2) == 1 and weight.stride(1) * weight.element_size() % ALIGNED == 0 for weight in weights)
    return [(LABEL, {})] if fits and not {"chosen", "weights"} & set(tensors) else []


def bind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: list[Any]) -> GroupedExperts:
    """The form with these weights. Raises KernelError."""
    if not offer(op, tensors, attributes, tensors["gate"].dtype, (1,), target):
        raise KernelError("the stored experts do not fit torch's grouped product", where=op, hint="save the model again")
    return GroupedExperts(options, dict(tensors) if bias is None else {**tensors, "bias": bias}, str(attributes["activation"]))


class GroupedExperts(BoundLayer):
    """x [..., K], chosen [..., k], weights [..., k] or none -> y [..., N], by experts gate and up [E, H, K], down [E, N, H]."""

    name = LABEL

    def __init__(self, options: Mapping[str, Any], tensors: Mapping[str, Tensor], activation: str) -> None:
        self.options, self._activation = dict(options), activation
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        gate, down = self._tensors["gate"], self._tensors["down"]
        self._dtype, self.in_features, self.out_features, self._experts = gate.dtype, gate.shape[2], down.shape[1], gate.shape[0]

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor | None = None) -> Tensor:
        """x of the weights' dtype, chosen int32 or int64, any strides -> a new y. Raises InputError."""
        rows, shape = self._sizes(x)
        places = chosen.reshape(-1)
        if not rows or not places.numel():
            return x.new_zeros(shape)
        exists = (places >= 0) & (places < self._experts)
        ordered, order = torch.where(exists, places, self._experts).sort(stable=True)
        ends = torch.searchsorted(ordered, torch.arange(self._experts), right=True).int()
        owner, expert = order // chosen.shape[-1], ordered.clamp_max(self._experts - 1)
        hidden = self._hidden(x.reshape(rows, -1)[owner], ends, expert)
        given = self._multiply("down", "bias", hidden, ends, expert).float()
        if weights is not None:
            given = given * weights.reshape(-1)[order, None]
        given = given.masked_fill_((ordered == self._experts)[:, None], 0)  # rows behind the last group are never written
        y = torch.zeros(rows, self.out_features, dtype=torch.float32).index_add_(0, owner, given)
        return y.to(x.dtype).view(shape)

    def _hidden(self, x: Tensor, ends: Tensor, expert: Tensor) -> Tensor:
        up = self._multiply("up", "up_bias", x, ends, expert) if "up" in self._tensors else None
        return select_ffn.hidden(self._activation, self._multiply("gate", "gate_bias", x, ends, expert), up)

    def _multiply(self, name: str, bias: str, x: Tensor, ends: Tensor, expert: Tensor) -> Tensor:
        y = grouped_mm(x, self._tensors[name].transpose(1, 2), offs=ends)
        return y + self._tensors[bias][expert] if bias in self._tensors else y

    def empty(self, x: Tensor, *given: Tensor) -> Tensor:  # type: ignore[override]
        """A y for this x, which may be fake. Raises InputError."""
        return super().empty(x)

    def state(self) -> dict[str, Tensor]:
        return self._tensors

    def files(self) -> dict[str, bytes]:
        """Nothing to store: the machine code is torch's."""
        return {}
