"""What weights of experts share.

A weight is a function `name(experts) -> Formula or None` in a file of its own, whose formula takes `scores` float32 [..., E] and `chosen` int64
[..., k] and gives float32 [..., k]; None for 1. Places of chosen that are -1 count for nothing, and may have any finite weight.
"""

from __future__ import annotations

from torch import Tensor


def of_chosen(values: Tensor, chosen: Tensor) -> Tensor:
    """[..., E] -> [..., k]; 0 for places without an expert."""
    return values.gather(-1, chosen.clamp_min(0)) * (chosen >= 0)
