"""Partner's mean: |gate| times the usual magnitude of what the neuron is multiplied with (CHESS, arXiv:2409.01366, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

STATISTICS: tuple[str, ...] = ("partner_mean",)


def partner_mean(weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor | None:
    """Mean of |up x|, float32 [K], so that one limit is a threshold a channel, limit / mean; no scale for a layer behind no gated FFN."""
    mean = statistics["partner_mean"]
    return mean if mean.numel() else None
