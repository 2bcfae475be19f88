"""L1: the sum of the magnitudes, whose gradient is the same for all (Han et al., arXiv:1506.02626)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def l1(weights: Sequence[Tensor], kept: int) -> Tensor:
    """sum |w|."""
    return torch.stack([weight.abs().sum() for weight in weights]).sum()
