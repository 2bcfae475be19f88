"""Channel quantile: |x| in units of its channel's own quantile (channel-wise thresholding, CHESS, arXiv:2409.01366, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

STATISTICS: tuple[str, ...] = ("input_rows",)


def channel_quantile(weight: Tensor, statistics: Mapping[str, Tensor], *, share: float = 0.5) -> Tensor:
    """1 / the magnitude below which `share` of the channel's values lie, float32 [K]; 0 for a channel that is always 0."""
    usual = torch.quantile(statistics["input_rows"].abs(), min(max(share, 0.0), 1.0), dim=0)
    return torch.where(usual > 0, 1 / usual, torch.zeros_like(usual))
