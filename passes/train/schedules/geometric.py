"""Geometric: the density falls by the same factor from stage to stage (Anytime Progressive Pruning, arXiv:2204.01640, of its mega-batches)."""

from __future__ import annotations

from sparsify_compiler.errors import ParseError


def geometric(step: int, *, density: float = 0.1, first: float = 0.8, stages: int = 8, every: int = 100) -> float:
    """(1 - d) / (1 - density), where d is `first` in the first stage, and `density` in the last, of `every` steps each, from which on it stays.

    density  what a layer keeps in the end, from which its sparsity is multiplied with this

    Raises ParseError unless 0 < density <= first <= 1, and for fewer than one stage or step.
    """
    if not 0 < density <= first <= 1 or density == 1 or stages < 1 or every < 1:
        raise ParseError(f"goes from {first} down to {density} in {stages} stages of {every} steps", where="schedule geometric",
                         hint="0 < density <= first <= 1, density below 1, and at least one stage and step")
    done = 1.0 if stages == 1 else min(step // every, stages - 1) / (stages - 1)
    return (1 - float(first * (density / first) ** done)) / (1 - density)
