"""Task-Specific Expert Pruning."""

from __future__ import annotations

from sparsify_compiler.passes.moe.drop_experts import DropExperts
from sparsify_compiler.passes.train.retire_experts import RetireExperts
from sparsify_compiler.pipeline import Pipeline


def task_expert_pruning(density: float | None = None, steps: int = 0, last: int = 1, window: int = 100) -> Pipeline:
    """Of the experts of a mixture keep those that the router gives the most weight to on texts of the task.

    steps: 0 to drop them at once, or how many steps of training it takes until `last` are left (the paper: half of them), for sc.attach(); then
    task_expert_pruning(last / experts) removes those that have retired.

    Paper      Task-Specific Expert Pruning for Sparse Mixture-of-Experts, Chen et al., arXiv:2206.00277
    """
    return Pipeline((RetireExperts(last, f"ramp(end={steps})", window) if steps else DropExperts("routed", density=density),))
