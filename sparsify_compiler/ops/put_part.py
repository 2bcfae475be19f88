"""put_part: a value with what a block gave in the places that take_part took."""

from __future__ import annotations

import torch
from torch import Tensor

from ._linear import LIBRARY
from .take_part import spread


def reference(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """x [B, T, ..] with y [m, T, ..] in the texts that index [m] names, or with y [B, n, ...] in the tokens that index [B, n] names of each text."""
    fits = y.dim() == x.dim() and index.dim() in (1, 2) and x.dim() > index.dim() - 1
    torch._check(fits, lambda: f"put_part: x, y and index have shapes {tuple(x.shape)}, {tuple(y.shape)} and {tuple(index.shape)}")  # type: ignore[no-untyped-call]
    return x.index_copy(0, index, y) if index.dim() == 1 else x.scatter(1, spread(index, x, 1), y)


LIBRARY.define("put_part(Tensor x, Tensor y, Tensor index) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("put_part", reference, "CompositeImplicitAutograd")
op = torch.ops.sparsify.put_part.default
