"""Equal error: every layer skips as much as brings the same relative error of its own output (CETT, Sparsing Law, arXiv:2411.02335, section 3)."""

from __future__ import annotations

import math

from sparsify_compiler.passes.activation.budgets._base import ROUNDS, Costs, Evidence

STATISTICS: tuple[str, ...] = ()


def equal_error(costs: Costs, density: float, evidence: Evidence) -> dict[str, float]:
    """Site -> density. The error that all share is found by bisection, such that `density` of all weights is read.

    The paper searches for the error at which the model's perplexity has risen by p %: Budget(perplexity_rise=p / 100) does that search.
    """
    curves = {site: [float(error) for error in evidence.errors(site)] for site in costs}
    wanted = density * sum(costs.values())
    low, high = 0.0, max((error for curve in curves.values() for error in curve), default=1.0)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        spent = math.fsum(cost * (1 - _share(curves[site], middle)) for site, cost in costs.items())
        low, high = (middle, high) if spent > wanted else (low, middle)
    return {site: 1 - _share(curve, high) for site, curve in curves.items()}


def _share(curve: list[float], error: float) -> float:
    """The largest share that can be skipped at an error, between the points that were measured."""
    steps = len(curve) - 1
    for step in range(steps):
        if curve[step + 1] > error:
            rise = curve[step + 1] - curve[step]
            return max(step + (error - curve[step]) / rise if rise > 0 else step, 0) / steps
    return 1.0
