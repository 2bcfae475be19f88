"""What estimators of a router's gradient share.

An estimator is a function `name(scores, chosen, weights, *, options...) -> (chosen, weights)` in a file of its own: scores float32 [..., E], chosen
int32 or int64 [..., k], -1 for none, weights [..., k], or None for ones; called where gradients are recorded alone. What it gives takes the places
of both in that forward pass, and carries the gradient to the scores.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shifted(weights: Tensor | None, gate: Tensor) -> Tensor:
    """The weights' values, with the gradient of the gate [..., k] beside their own."""
    return (torch.ones_like(gate) if weights is None else weights) + (gate - gate.detach())
