"""Uniform: every layer keeps the same share."""

from __future__ import annotations

from sparsify_compiler.passes.prune.budgets._base import Evidence, Shapes

STATISTICS: tuple[str, ...] = ()


def uniform(shapes: Shapes, density: float, evidence: Evidence | None = None) -> dict[str, float]:
    """Site -> density, the same for all."""
    return dict.fromkeys(shapes, density)
