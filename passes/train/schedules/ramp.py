"""Ramp: from 0 to 1 in equal steps (the growing number of experts of SMoE-Dropout, arXiv:2303.01610, section 3.2)."""

from __future__ import annotations

from sparsify_compiler.errors import ParseError


def ramp(step: int, *, start: int = 0, end: int = 1000) -> float:
    """0 until `start`, 1 from `end` on. Raises ParseError unless start < end."""
    if start >= end:
        raise ParseError(f"starts at {start} and ends at {end}", where="schedule ramp")
    return min(max((step - start) / (end - start), 0.0), 1.0)
