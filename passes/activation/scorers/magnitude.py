"""Magnitude: |x| alone (TEAL, arXiv:2408.14690, section 4)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

STATISTICS: tuple[str, ...] = ()


def magnitude(weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor | None:
    """No scale."""
    return None
