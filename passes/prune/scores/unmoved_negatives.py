"""Unmoved negatives: beside the smallest weights, the negative ones that training moved least go (Activate-While-Pruning, arXiv:2212.06145).

What a ReLU reads is then larger, and fewer of its neurons are dead for an input.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsify_compiler.errors import ParseError
from sparsify_compiler.passes.prune.scores._base import magnitudes

STATISTICS: tuple[str, ...] = ("start",)


def unmoved_negatives(weight: Tensor, statistics: Mapping[str, Tensor], seed: int, *, share: float = 0.1) -> Tensor:
    """float64, of the weight's shape: the lower of two ranks, by |W| over 1 - share and, of W < 0, by |W - W at the start| over the share.

    However many go, that share of them are so negative ones, the rest the smallest (less those that are both). Weights that are 0 have gone before.
    """
    if not 0 < share < 1:
        raise ParseError(f"a share lies between 0 and 1, got {share}", where="score unmoved_negatives", hint="magnitude, for none of them")
    size, moved = magnitudes(weight).flatten(), magnitudes(weight.detach() - statistics["start"].to(weight)).flatten()
    negative = weight.detach().flatten() < 0
    small = (_ranks(size) - (size == 0).sum()).clamp_min(0) / (1 - share)
    idle = torch.full_like(small, torch.inf)
    idle[negative] = _ranks(moved[negative]) / share
    return torch.minimum(small, idle).view(weight.shape)


def _ranks(values: Tensor) -> Tensor:
    """float64: 0 for the lowest, 1 for the next."""
    ranks = torch.empty(len(values), dtype=torch.float64, device=values.device)
    ranks[values.argsort(stable=True)] = torch.arange(len(values), dtype=torch.float64, device=values.device)
    return ranks
