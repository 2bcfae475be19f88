"""take_part: of a value those texts, or of each text those tokens, that a block runs on; put_part brings back what it gives."""

from __future__ import annotations

import torch
from torch import Tensor

from ._linear import LIBRARY


def reference(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """index int64 [m]: x.index_select(dim, index). index int64 [B, n]: of text b the n places of `dim` that row b names; x has B texts, or one.

    The text is x's first dimension. Differentiable in x.
    """
    torch._check(index.dim() in (1, 2) and index.dim() - 1 <= dim < x.dim(),
                 lambda: f"take_part: x and index have shapes {tuple(x.shape)} and {tuple(index.shape)}, and no dimension {dim} of texts or tokens")  # type: ignore[no-untyped-call]
    if index.dim() == 1:
        return x.index_select(dim, index)
    return x.expand(index.shape[0], *x.shape[1:]).gather(dim, spread(index, x, dim))


def spread(index: Tensor, x: Tensor, dim: int) -> Tensor:
    """index [B, n] as gather and scatter want it: [B, ..., n, ...] with x's sizes elsewhere."""
    whole = index.view(index.shape[0], *[1] * (dim - 1), index.shape[1], *[1] * (x.dim() - dim - 1))
    return whole.expand(-1, *x.shape[1:dim], -1, *x.shape[dim + 1 :])


LIBRARY.define("take_part(Tensor x, Tensor index, int dim) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("take_part", reference, "CompositeImplicitAutograd")
op = torch.ops.sparsify.take_part.default
