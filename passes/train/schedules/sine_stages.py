"""Sine stages: from one level to the next along half a wave of a sine, stage by stage (ProSparse, arXiv:2402.13516, section 3.2)."""

from __future__ import annotations

import math
from itertools import pairwise

from sparsify_compiler.errors import ParseError


def sine_stages(step: int, *, ends: tuple[int, ...] = (100, 400, 1000), levels: tuple[float, ...] = (0.1, 0.4, 1.0)) -> float:
    """levels[0] until ends[0]; then, up to each further end, from the level before to its own, slowly at first and last. The last level stays.

    Raises ParseError where there are not as many levels as ends, or the ends do not grow.
    """
    if len(ends) != len(levels) or not ends or any(a >= b for a, b in pairwise(ends)):
        raise ParseError(f"needs as many levels as ends, and ends that grow: {ends}, {levels}", where="schedule sine_stages")
    begin, low = 0, levels[0]
    for end, high in zip(ends, levels, strict=True):
        if step < end:
            return low + (high - low) * (1 + math.sin(math.pi * ((step - begin) / (end - begin) - 0.5))) / 2
        begin, low = end, high
    return levels[-1]
