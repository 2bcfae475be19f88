"""Threshold: the pairs of blocks whose share of the row's mass reaches a number (SeerAttention, arXiv:2410.13276, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor


def threshold(scores: Tensor, read: Tensor, *, share: float = 0.01) -> Tensor:
    """The pairs to read: share of a row's softmax over its scores, or more, and in any case the largest one of the row.

    What must be read has no mass, as nobody knows it.
    """
    visible, must = scores > -torch.inf, scores == torch.inf
    shares = torch.softmax(scores.masked_fill(must, -torch.inf), -1).nan_to_num(0)
    largest = shares.amax(-1, keepdim=True) if shares.shape[-1] else shares
    return visible & (must | (shares >= torch.clamp(largest, max=share)))
