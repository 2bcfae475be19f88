"""Task-Specific Expert Pruning."""

from __future__ import annotations

from sparsify_compiler.passes.moe.drop_experts import DropExperts
from sparsify_compiler.pipeline import Pipeline


def task_expert_pruning(density: float | None = None) -> Pipeline:
    """Of the experts of a mixture keep those that the router gives the most weight to on texts of the task; in one shot, not while it is trained.

    Paper      Task-Specific Expert Pruning for Sparse Mixture-of-Experts, Chen et al., arXiv:2206.00277
    """
    return Pipeline((DropExperts("routed", density=density),))
