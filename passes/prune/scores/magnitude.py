"""Magnitude: the absolute value of the weight (Han et al., arXiv:1506.02626)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

STATISTICS: tuple[str, ...] = ()


def magnitude(weight: Tensor, statistics: Mapping[str, Tensor], seed: int) -> Tensor:
    """|W|, float32 (float64 for float64), of the weight's shape."""
    return weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32))
