"""Density: a smooth count of what is not zero (DEFT, arXiv:2402.01911, section 3)."""

from __future__ import annotations

from torch import Tensor


def density(x: Tensor, *, width: float = 0.1) -> Tensor:
    """mean of x² / (x² + width²): near 1 for numbers far beyond the width, near 0 for those far below.

    Unlike l1, large numbers feel it hardly: it takes those away that are small already.
    """
    square = x.square()
    return (square / (square + width * width)).mean()
