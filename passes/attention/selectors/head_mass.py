"""Head mass: the pairs of blocks of a whole head that hold a share of its likeness; some rows read more than others (VMoBA, arXiv:2506.23858)."""

from __future__ import annotations

import torch
from torch import Tensor


def head_mass(scores: Tensor, read: Tensor, *, mass: float = 0.25, blocks: int = 1) -> Tensor:
    """The fewest pairs of a head, with what is read anyway, whose scores, from 0 for the head's least to 1 for its largest, add up to `mass` of all.

    For scorers whose rows compare with each other, as `pooled` does.

    blocks   of each row, those of its highest scores, as many at least
    """
    visible, must = scores > -torch.inf, scores == torch.inf
    if not scores.numel():
        return visible
    counted = visible & ~must
    least = scores.masked_fill(~counted, torch.inf).amin((-2, -1), keepdim=True)
    largest = scores.masked_fill(~counted, -torch.inf).amax((-2, -1), keepdim=True)
    likeness = ((scores.masked_fill(~counted, 0) - least) / (largest - least).clamp(min=1e-6)).nan_to_num(0).masked_fill(~counted, 0)
    anyway = (read | must) & visible
    flat = (likeness + 2.0 * anyway).flatten(-2)
    order = flat.argsort(dim=-1, descending=True, stable=True)
    ordered = likeness.flatten(-2).gather(-1, order)
    enough = ordered.cumsum(-1) - ordered >= mass * ordered.sum(-1, keepdim=True) - 1e-6
    taken = torch.zeros_like(enough).scatter_(-1, order, ~enough).view_as(visible)
    rank = scores.masked_fill(anyway, torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return visible if mass >= 1 else visible & (taken | (rank < blocks) | must)

