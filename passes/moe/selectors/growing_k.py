"""Growing k: the k experts of highest score, where k is a number of the graph that training and users may move (SMoE-Dropout, arXiv:2303.01610)."""

from __future__ import annotations

import torch
from torch import Tensor

MOVES = True


def growing_k(scores: Tensor, number: float | Tensor) -> Tensor:
    """All experts from the highest score on; behind the k-th, none."""
    order = scores.argsort(-1, descending=True)
    return torch.where(torch.arange(scores.shape[-1], dtype=torch.int64, device=scores.device) < number, order, -1)


def calibrate(scores: Tensor, share: float) -> float:
    """As many as make the share, at least one."""
    return float(max(1, round(share * scores.shape[-1])))
