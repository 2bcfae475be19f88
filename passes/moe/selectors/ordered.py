"""Ordered: experts from the first on, as many as the row needs; they refine what those before them give (ACM, arXiv:2312.10193)."""

from __future__ import annotations

import torch
from torch import Tensor

STATISTICS = ("rows",)
MOVES = True
STEPS = 40


def ordered(scores: Tensor, number: float | Tensor) -> Tensor:
    """The first expert, and each further one for as long as it and those behind it have more than `number` of the row's positive scores."""
    size = scores.clamp_min(0)
    behind = size.flip(-1).cumsum(-1).flip(-1)
    wanted = (behind > number * behind[..., :1]) | (number < 0)
    experts = torch.arange(scores.shape[-1], dtype=torch.int64, device=scores.device)
    return torch.where(wanted | (experts == 0), experts, -1)


def calibrate(scores: Tensor, share: float) -> float:
    """By bisection; a negative number, which lets all pass whatever the scores, for all of the experts."""
    low, high = 0.0, 1.0
    if share >= 1:
        return -1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        enough = float((ordered(scores, middle) >= 0).float().mean()) >= share
        low, high = (middle, high) if enough else (low, middle)
    return low
