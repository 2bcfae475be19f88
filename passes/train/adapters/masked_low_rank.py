"""A low-rank change inside of the weight's mask, which stays when it is merged (SQFT's SparsePEFT, arXiv:2410.03750, section 3.2)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from sparsify_compiler.passes.train.adapters._base import Adapter, factors


def masked_low_rank(weight: Tensor, seed: int, mask: Tensor | None = None, *, rank: int = 8, scale: float = 1.0) -> Adapter:
    """weight + scale * writes reads."""
    return Adapter("inside", partial(_changed, scale=scale), factors(weight, rank, seed))


def _changed(weight: Tensor, reads: Tensor, writes: Tensor, *, scale: float) -> Tensor:
    return weight + scale * (writes @ reads)
