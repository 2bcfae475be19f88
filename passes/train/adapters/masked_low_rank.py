"""A low-rank change inside of the weight's mask, which stays when it is merged (SQFT's SparsePEFT, arXiv:2410.03750, section 3.2)."""

from __future__ import annotations

from torch import Tensor

BESIDE = False


def masked_low_rank(weight: Tensor, reads: Tensor, writes: Tensor, *, rank: int = 8, scale: float = 1.0) -> Tensor:
    """weight + scale * writes reads."""
    return weight + scale * (writes @ reads)
