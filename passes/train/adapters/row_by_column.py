"""A change in proportion to the weight, by rows and columns: zeros stay what they are (SPP, arXiv:2405.16057, section 3.2)."""

from __future__ import annotations

from torch import Tensor

BESIDE = False


def row_by_column(weight: Tensor, reads: Tensor, writes: Tensor, *, rank: int = 1, scale: float = 1.0) -> Tensor:
    """weight * (1 + scale * writes reads)."""
    return weight + weight * (scale * (writes @ reads))
