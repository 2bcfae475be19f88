"""Weight norm: |x| times the length of the weights that it meets (WINA, arXiv:2505.19427, section 3)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

STATISTICS: tuple[str, ...] = ()


def weight_norm(weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
    """||W[:, k]||, float32 [K], of a weight [N, K]."""
    return weight.detach().float().square().sum(0).sqrt()
