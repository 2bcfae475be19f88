"""Line: from 1 to 0 in equal steps (the linear mask decay of Progressive Gradient Flow, arXiv:2402.04744)."""

from __future__ import annotations

from sparsify_compiler.errors import ParseError


def line(step: int, *, start: int = 0, end: int = 1000) -> float:
    """1 until `start`, 0 from `end` on. Raises ParseError unless start < end."""
    if start >= end:
        raise ParseError(f"starts at {start} and ends at {end}", where="schedule line")
    return 1 - min(max((step - start) / (end - start), 0.0), 1.0)
