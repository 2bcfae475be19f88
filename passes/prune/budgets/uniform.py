"""Uniform: every layer keeps the same share."""

from __future__ import annotations

from collections.abc import Mapping


def uniform(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """Site -> density, the same for all."""
    return dict.fromkeys(shapes, density)
