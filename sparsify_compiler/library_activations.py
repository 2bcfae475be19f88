"""Which of our activations a function of somebody else's library is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .ops.select_ffn import ACTIVATIONS, UP


def activation_name(function: Callable[[Tensor], Tensor]) -> str | None:
    """What ops/select_ffn.py calls this activation, recognised by its values; None where it is another."""
    points = torch.linspace(-8, 8, 257, dtype=torch.float64)
    try:
        values = function(points.clone())
    except (TypeError, RuntimeError):  # a module of the user's own that takes something else
        return None
    fits = (name for name, known in ACTIVATIONS.items() if name not in UP and torch.allclose(values, known(points), rtol=0, atol=1e-7))
    return next(fits, None)
