"""Random: the yardstick that every other score must beat."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

STATISTICS: tuple[str, ...] = ()


def random(weight: Tensor, statistics: Mapping[str, Tensor], seed: int) -> Tensor:
    """Uniform in [0, 1), float32, of the weight's shape; the same for the same seed."""
    return torch.rand(weight.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed)).to(weight.device)
