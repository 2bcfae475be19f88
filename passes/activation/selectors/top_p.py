"""Top-p: as many inputs as make up a share of the row's total score (Twilight's selection, arXiv:2502.02770, for channels)."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 40  # of the bisection: each halves an interval of shares


def top_p(score: Tensor, number: float) -> Tensor:
    """The score that the last of the largest ones has which together reach `number` of the row's sum."""
    ordered = score.sort(-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    enough = before < number * ordered.sum(-1, keepdim=True)
    return torch.where(enough, ordered, ordered[..., :1]).amin(-1, keepdim=True)


def calibrate(scores: Tensor, density: float) -> float:
    """The share at which `density` of the sampled scores [rows, K] is selected on average."""
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        taken = float((scores >= top_p(scores, middle)).float().mean())
        low, high = (middle, high) if taken < density else (low, middle)
    return high
