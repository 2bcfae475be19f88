"""Fitted experts."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.pipeline import Pipeline


def fitted_experts(experts: int = 16, shared: float = 0.25, density: float | None = None) -> Pipeline:
    """Neurons active together, a linear router in closed form, down projections fitted to the dense output by least squares: no training.

    Paper      none: the best choice without training in benchmarks/experts_quality.py, of parts of CMoE (arXiv:2502.04416) and MoEfication
    """
    return Pipeline((SplitExperts(experts, "coactivation_graph", "ridge", "top_k", shared, repair="least_squares", density=density),))
