"""Top-p: the fewest experts whose probabilities sum up to p (XMoE, arXiv:2403.18926, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

STATISTICS = ("rows",)
MOVES = True
STEPS = 40


def top_p(scores: Tensor, number: float | Tensor, *, temperature: float = 1.0) -> Tensor:
    """softmax(scores / temperature), from the largest on while the sum before lies below p: at least one."""
    odds = (scores / temperature).softmax(-1)
    ordered, order = odds.sort(-1, descending=True)
    return torch.where(ordered.cumsum(-1) - ordered < number, order, -1)


def calibrate(scores: Tensor, share: float, *, temperature: float = 1.0) -> float:
    """By bisection; beyond every sum, whatever its rounding, for all of the experts."""
    low, high = 0.0, 2.0
    if share >= 1:
        return high
    for _ in range(STEPS):
        middle = (low + high) / 2
        enough = float((top_p(scores, middle, temperature=temperature) >= 0).float().mean()) >= share
        low, high = (low, middle) if enough else (middle, high)
    return high
