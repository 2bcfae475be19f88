"""Threshold: every expert whose score reaches a limit; few in an easy row and many in a hard one (the ReLU of BlockFFN, arXiv:2507.08771)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.passes.moe.selectors._base import places

STATISTICS = ("rows",)
MOVES = True


def threshold(scores: Tensor, number: float | Tensor) -> Tensor:
    """Maybe none."""
    return places(scores >= number)


def calibrate(scores: Tensor, share: float) -> float:
    """The score that `share` of all reach; one that every score reaches for all of them."""
    if share >= 1:
        return float("-inf")
    count = min(max(1, round(share * scores.numel())), scores.numel())
    return float(torch.kthvalue(scores.flatten(), scores.numel() - count + 1).values)
