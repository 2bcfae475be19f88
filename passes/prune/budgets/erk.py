"""ERK: Erdős–Rényi kernel (RigL, arXiv:1911.11134, section 3)."""

from __future__ import annotations

from sparsify_compiler.passes.prune.budgets._base import Evidence, Shapes, scaled, sizes_of

STATISTICS: tuple[str, ...] = ()


def erk(shapes: Shapes, density: float, evidence: Evidence | None = None) -> dict[str, float]:
    """Site -> density, proportional to (sum of the weight's dimensions) / (their product), at most 1; small layers keep more."""
    sizes = sizes_of(shapes)
    return scaled({site: sum(shape) / sizes[site] if sizes[site] else 1.0 for site, shape in shapes.items()}, sizes, density)
