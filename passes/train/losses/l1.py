"""L1: the mean magnitude (ProSparse, arXiv:2402.13516, section 3.2)."""

from __future__ import annotations

from torch import Tensor


def l1(x: Tensor) -> Tensor:
    """mean |x|."""
    return x.abs().mean()
