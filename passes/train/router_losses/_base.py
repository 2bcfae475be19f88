"""What a loss of a router is given.

A loss is a function `name(scores, chosen, *, options...) -> Tensor []` in a file of its own: scores float32 [..., E] and chosen int64 [..., k] of one
forward pass of one router, -1 for none. Differentiable in the scores; it depends neither on the number of rows nor on that of experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def counts(chosen: Tensor, experts: int) -> Tensor:
    """float32 [E]: how often each expert was chosen."""
    flat = chosen.flatten() + 1
    return torch.bincount(flat, minlength=experts + 1)[1:].float()
