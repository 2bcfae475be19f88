"""Uniform: every layer reads the same share of its inputs."""

from __future__ import annotations

from sparsify_compiler.passes.activation.budgets._base import Costs, Evidence

STATISTICS: tuple[str, ...] = ()


def uniform(costs: Costs, density: float, evidence: Evidence | None = None) -> dict[str, float]:
    """Site -> density, the same for all."""
    return dict.fromkeys(costs, density)
