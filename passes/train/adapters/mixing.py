"""A low-rank change of what a layer gives, which merges into it (the hybrid sparsification module of PAT, arXiv:2408.14721)."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.passes.train.adapters._base import Adapter, check_rank, uniform


def mixing(weight: Tensor, seed: int, mask: Tensor | None = None, *, rank: int = 8, scale: float = 1.0) -> Adapter:
    """y + scale * linear(linear(y, reads), writes), y what the layer gives; writes start at 0. What is cut of y can be said by the rest."""
    check_rank(rank)
    width = weight.shape[0]
    tensors = {"reads": uniform((rank, width), seed).to(weight), "writes": weight.new_zeros(width, rank)}
    return Adapter("behind", partial(_changed, scale=scale), tensors)


def _changed(y: Tensor, reads: Tensor, writes: Tensor, *, scale: float) -> Tensor:
    change = linear(linear(y, reads), writes)
    return change if scale == 1 else change * scale
