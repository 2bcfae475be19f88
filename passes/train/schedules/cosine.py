"""Cosine: from 1 to 0 along half a wave (RigL, arXiv:1911.11134, section 3)."""

from __future__ import annotations

import math

from sparsify_compiler.errors import ParseError


def cosine(step: int, *, end: int = 1000) -> float:
    """(1 + cos(π step / end)) / 2, and 0 from `end` on. Raises ParseError unless end is at least 1."""
    if end < 1:
        raise ParseError(f"ends at {end}", where="schedule cosine")
    return (1 + math.cos(math.pi * min(step / end, 1.0))) / 2
