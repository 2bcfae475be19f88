"""Leading: channels in the order that they are in; for a basis that is sorted by importance (SliceGPT, arXiv:2401.15024, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

STATISTICS: tuple[str, ...] = ()


def leading(weight: Tensor, statistics: Mapping[str, Tensor], seed: int) -> Tensor:
    """1 - k / K for input k of K, float32, of the weight's shape: the first inputs count most."""
    inputs = weight.shape[1]
    falling = 1 - torch.arange(inputs, dtype=torch.float32, device=weight.device) / max(inputs, 1)
    return falling.reshape(1, -1, *(1,) * (weight.dim() - 2)).expand(weight.shape).contiguous()
