"""SMoE-Dropout."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.schedule_experts import ScheduleExperts
from sparsify_compiler.pipeline import Pipeline


def smoe_dropout(experts: int = 16, first: int = 1, steps: int = 1000) -> Pipeline:
    """For training: a random router over experts of equal size, of which a row runs through more and more, up to all of them.

    The paper's router stays as it is drawn: leave its parameters, those of "router" in their names, out of the optimizer

    Paper      Sparse MoE as the New Dropout: Scaling Dense and Self-Slimmable Transformers, Chen et al., arXiv:2303.01610
    """
    split = SplitExperts(experts, "random", "random", "growing_k", 0.0, "weight_norm", repair="none", density=1.0)
    return Pipeline((split, ScheduleExperts(float(first), float(experts), f"ramp(end={steps})")))
