"""Top-k: as many pairs of blocks in every row, those of highest score."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores: Tensor, read: Tensor, *, share: float = 0.5, blocks: int = 0) -> Tensor:
    """The pairs to read; what is read anyway, and what must be, counts among them.

    share    of the visible pairs of a row, rounded up
    blocks   as many at least
    """
    visible = scores > -torch.inf
    number = (visible.sum(-1, keepdim=True) * share).sub(1e-6).ceil().clamp(min=max(blocks, 1))
    first = scores.masked_fill(read & visible, torch.inf)
    least = min(max(blocks, 1), scores.shape[-1])
    order = first.argsort(dim=-1, descending=True, stable=True) if share else first.topk(least).indices
    taken = torch.arange(order.shape[-1], device=scores.device) < number
    return visible & (torch.zeros_like(visible).scatter_(-1, order, taken) | (first == torch.inf))


def numbers(*, share: float = 0.5, blocks: int = 0) -> tuple[float, int]:
    """The same as numbers: the share of the pairs, and how many at least."""
    return share, max(blocks, 1)
