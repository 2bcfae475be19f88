"""A low-rank change beside the layer, which its mask does not touch (LoRA, arXiv:2106.09685; of masked layers DSEE, arXiv:2111.00160)."""

from __future__ import annotations

from torch import Tensor

BESIDE = True


def low_rank(weight: Tensor, reads: Tensor, writes: Tensor, *, rank: int = 8, scale: float = 1.0) -> Tensor:
    """weight + scale * writes reads."""
    return weight + scale * (writes @ reads)
