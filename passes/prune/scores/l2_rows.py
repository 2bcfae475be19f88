"""L2 norm of whole rows, or of heads, which are runs of rows (Pruning Filters for Efficient ConvNets, arXiv:1608.08710, with L2 for L1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.prune.scores._base import magnitudes

STATISTICS: tuple[str, ...] = ()


def l2_rows(weight: Tensor, statistics: Mapping[str, Tensor], seed: int, *, size: int = 1) -> Tensor:
    """Root mean square of the `size` rows that a weight lies in (size = head_dim for heads), float32, of the weight's shape.

    Meant for the structure Rows(size). Raises StructureError where the rows do not divide.
    """
    rows = weight.shape[0]
    if size < 1 or rows % size:
        raise StructureError(f"{rows} rows do not divide into runs of {size}", where="score l2_rows")
    squares = magnitudes(weight).square().reshape(rows // size, -1)
    norm = squares.mean(1).sqrt() if squares.shape[1] else torch.zeros(rows // size, dtype=squares.dtype, device=weight.device)
    return norm.repeat_interleave(size).reshape(-1, *(1,) * (weight.dim() - 1)).expand(weight.shape).contiguous()
