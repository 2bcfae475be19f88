"""Hoyer: the square of the L1 norm over that of the L2 norm, which no scale changes (DeepHoyer, arXiv:1908.09979, section 3)."""

from __future__ import annotations

from torch import Tensor


def hoyer(x: Tensor) -> Tensor:
    """mean over the rows of (sum |x|)² / (K sum x²): between 1 / K for one number that is not zero and 1 for equal ones; 0 for a row of zeros."""
    return (x.abs().sum(-1).square() / (x.square().sum(-1) * x.shape[-1]).clamp_min(1e-12)).mean()
