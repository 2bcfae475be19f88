"""A change in proportion to the weight, by rows and columns: zeros stay what they are (SPP, arXiv:2405.16057, section 3.2)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from sparsify_compiler.passes.train.adapters._base import Adapter, factors


def row_by_column(weight: Tensor, seed: int, mask: Tensor | None = None, *, rank: int = 1, scale: float = 1.0) -> Adapter:
    """weight * (1 + scale * writes reads)."""
    return Adapter("inside", partial(_changed, scale=scale), factors(weight, rank, seed))


def _changed(weight: Tensor, reads: Tensor, writes: Tensor, *, scale: float) -> Tensor:
    return weight + weight * (scale * (writes @ reads))
