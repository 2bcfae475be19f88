"""Given: every layer keeps the share that is told, as a plan tells it."""

from __future__ import annotations

from collections.abc import Mapping

from sparsify_compiler.errors import BudgetError
from sparsify_compiler.passes.prune.budgets._base import Evidence, Shapes

STATISTICS: tuple[str, ...] = ()
NOTHING: Mapping[str, float] = {}


def given(shapes: Shapes, density: float, evidence: Evidence | None = None, *, densities: Mapping[str, float] = NOTHING) -> dict[str, float]:
    """Site -> the density that `densities` tells by its path; a layer that it does not name stays dense. The total is what comes of it.

    Raises BudgetError for a density that does not lie above 0 and at most at 1.
    """
    wrong = next((site for site, value in densities.items() if isinstance(value, bool) or not 0 < value <= 1), None)
    if wrong is not None:
        raise BudgetError(f"a density lies above 0 and at most at 1, got {densities[wrong]}", where=f"budget given, {wrong}")
    return {site: float(densities.get(site, 1.0)) for site in shapes}
