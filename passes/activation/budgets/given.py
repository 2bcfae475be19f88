"""Given: every layer reads the share of its inputs that is told, as a plan tells it."""

from __future__ import annotations

from collections.abc import Mapping

from sparsify_compiler.passes.activation.budgets._base import Costs, Evidence
from sparsify_compiler.passes.prune.budgets.given import NOTHING
from sparsify_compiler.passes.prune.budgets.given import given as of_weights

STATISTICS: tuple[str, ...] = ()


def given(costs: Costs, density: float, evidence: Evidence | None = None, *, densities: Mapping[str, float] = NOTHING) -> dict[str, float]:
    """Site -> the density that `densities` tells by its path; a layer that it does not name reads everything.

    Raises BudgetError for a density that does not lie above 0 and at most at 1.
    """
    return of_weights({site: (cost,) for site, cost in costs.items()}, density, None, densities=densities)
