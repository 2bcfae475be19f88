"""Exponential: a rate's share less, or more, with every step (mask decay of arXiv:2402.04744; growing weights of losses, arXiv:2308.07163)."""

from __future__ import annotations

import math

from sparsify_compiler.errors import ParseError

LARGEST = 700.0  # exp() of it is a number, just


def exponential(step: int, *, start: int = 0, end: int = 1000, rate: float = 0.01, before: float = 1.0) -> float:
    """`before` until `start`, exp(-rate (step - start)) from there on, 0 from `end` on; a rate below 0 makes it grow.

    Raises ParseError unless start < end, and where it would grow beyond what a number holds before its end.
    """
    if start >= end:
        raise ParseError(f"starts at {start} and ends at {end}", where="schedule exponential")
    if -rate * (end - 1 - start) > LARGEST:
        raise ParseError(f"a rate of {rate} grows beyond what a number holds in {end - 1 - start} steps", where="schedule exponential",
                         hint=f"a rate of {-LARGEST / (end - 1 - start):.3g} or above, or an earlier end")
    if step < start:
        return before
    return math.exp(-rate * (step - start)) if step < end else 0.0
