"""After: 0 before a step, 1 from there on."""

from __future__ import annotations


def after(step: int, *, start: int = 1000) -> float:
    """step >= start."""
    return float(step >= start)
