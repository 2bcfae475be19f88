"""Sparse linear layers in training, on a CPU in float32: the product, and its gradients, over the kept places alone.

The parameter is the format's own `values`; what the kernels need beside it, the transposed index, is made once for a set of kept places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler import catalog
from sparsify_compiler.codegen import build
from sparsify_compiler.codegen.kernels.layout import Groups
from sparsify_compiler.codegen.kernels.pack_columns import PackColumns
from sparsify_compiler.codegen.kernels.packed_product import PackedProduct
from sparsify_compiler.codegen.kernels.sampled_product import SampledProduct
from sparsify_compiler.formats._base import pointers_from_counts
from sparsify_compiler.target import host

PANELS = (128, 64, 32, 16)      # rows of a panel, most first
HELD = 1 << 20                  # bytes of a panel's packed columns that stay in L2


@dataclass(frozen=True)
class _Index:
    """Kept places, for kernels: groups of r outputs; columns [S], pointers [groups + 1] int32, order [S * r] int32 or None."""

    r: int
    columns: Tensor
    pointers: Tensor
    order: Tensor | None = None

    @property
    def dtype(self) -> str:
        return str(self.columns.dtype).removeprefix("torch.")


class TrainedLinear:
    """The kernels of one sparse layer. x [M, K] and the gradient of y [M, N] are float32 matrices on the CPU, contiguous."""

    def __init__(self, op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> None:
        groups = catalog.get("kernel", op).groups(tensors, attributes)
        self.out_features, self.in_features = int(attributes["out_features"]), int(attributes["in_features"])
        self._forward = _forward_index(groups, self.in_features)
        self._backward = _backward_index(groups, self.out_features, self.in_features)

    @property
    def index_bytes(self) -> int:
        """Of what is kept beside the values."""
        kept = (self._forward.columns, self._forward.pointers, self._backward.columns, self._backward.pointers, self._backward.order)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor is not None)

    def pack(self, x: Tensor) -> Tensor:
        """x [M, K] as packed columns [panels, K, panel]."""
        return self._pack(x, self.in_features)

    def pack_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of y [M, N] in the same way, with zeros up to whole groups of outputs."""
        return self._pack(gradient, (len(self._forward.pointers) - 1) * self._forward.r)

    def _pack(self, x: Tensor, columns: int) -> Tensor:
        panel = panel_of(x.shape[0], max(self.in_features, self.out_features))
        packed = torch.empty(-(-x.shape[0] // panel), columns, panel, dtype=torch.float32)
        build.load(PackColumns(panel), host()).function(x, packed)
        return packed

    def product(self, packed: Tensor, rows: int, values: Tensor, bias: Tensor | None) -> Tensor:
        """y [rows, N] of packed x."""
        return _product(self._forward, packed, rows, values, bias, self.out_features)

    def input_gradient(self, packed: Tensor, rows: int, values: Tensor) -> Tensor:
        """Of x, [rows, K], from the packed gradient of y."""
        return _product(self._backward, packed, rows, values, None, self.in_features)

    def value_gradient(self, gradient: Tensor, x: Tensor, values: Tensor) -> Tensor:
        """Of the values, shaped like them, from the packed gradient of y and packed x."""
        made, index = torch.empty_like(values, requires_grad=False), self._forward
        build.load(SampledProduct(index.r, x.shape[2], index.dtype), host()).function(gradient, x, index.columns, index.pointers, made.view(-1))
        return made


def panel_of(rows: int, columns: int) -> int:
    """Rows of a panel: as many as leave it in a cache, and few rows too many."""
    fitting = [size for size in PANELS if size * columns * 4 <= HELD] or [PANELS[-1]]
    return min(fitting, key=lambda size: (-(-rows // size) * size, -size))


def _product(index: _Index, packed: Tensor, rows: int, values: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    y = torch.empty(rows, outputs, dtype=torch.float32)
    kernel = build.load(PackedProduct(index.r, packed.shape[2], index.dtype, index.order is not None, bias is not None), host())
    order, added = ([index.order] if index.order is not None else []), ([bias.detach()] if bias is not None else [])
    kernel.function(packed, values.detach().view(-1), *order, index.columns, index.pointers, *added, y)
    return y


def _forward_index(groups: Groups, inputs: int) -> _Index:
    return _Index(groups.values.shape[1], _narrow(groups.columns, inputs), groups.pointers.int())


def _backward_index(groups: Groups, outputs: int, inputs: int) -> _Index:
    """The transposed weight, input by input, outputs ascending; places past the last output are left out."""
    r = groups.values.shape[1]
    group = torch.repeat_interleave(torch.arange(len(groups.pointers) - 1), groups.pointers.diff())
    output = (group[:, None] * r + torch.arange(r)).reshape(-1)
    column = groups.columns[:, None].expand(-1, r).reshape(-1)
    order = torch.argsort(column * (outputs + r) + output)
    order = order[output[order] < outputs]
    counts = torch.bincount(column[order], minlength=inputs)
    return _Index(1, _narrow(output[order], outputs), pointers_from_counts(counts), order.int())


def _narrow(columns: Tensor, limit: int) -> Tensor:
    return columns.to(torch.int16 if limit <= 32767 else torch.int32)
