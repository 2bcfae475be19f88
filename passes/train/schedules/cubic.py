"""Cubic: fast at first, slower and slower towards the end (Zhu and Gupta, To prune, or not to prune, arXiv:1710.01878, equation 1)."""

from __future__ import annotations

from sparsify_compiler.errors import ParseError


def cubic(step: int, *, start: int = 0, end: int = 1000, initial: float = 0.0) -> float:
    """1 - (1 - initial) (1 - t)³, where t goes from 0 at `start` to 1 at `end`; `initial` before, 1 after. Raises ParseError unless start < end."""
    if start >= end:
        raise ParseError(f"starts at {start} and ends at {end}", where="schedule cubic")
    left = 1 - min(max((step - start) / (end - start), 0.0), 1.0)
    return 1 - (1 - initial) * left**3
