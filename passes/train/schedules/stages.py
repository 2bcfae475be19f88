"""Stages: levels one after the other, without anything between them (structure decay of Progressive Gradient Flow, arXiv:2402.04744)."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

from sparsify_compiler.errors import ParseError


def stages(step: int, *, starts: tuple[int, ...] = (100, 1000), levels: tuple[float, ...] = (0.5, 1.0)) -> float:
    """0 until starts[0], then each level from its start on; the last one stays.

    Raises ParseError where there are not as many levels as starts, or the starts do not grow.
    """
    if len(starts) != len(levels) or not starts or any(a >= b for a, b in pairwise(starts)):
        raise ParseError(f"needs as many levels as starts, and starts that grow: {starts}, {levels}", where="schedule stages")
    found = bisect_right(starts, step)
    return levels[found - 1] if found else 0.0
