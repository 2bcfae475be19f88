"""Adaptive Computation Modules."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.pipeline import Pipeline


def acm(learners: int = 8, density: float | None = None) -> Pipeline:
    """Learners in an order, the most important neurons first, of which a row computes as many as a gate says: few for easy rows.

    Here learners are the dense FFN's own neurons and the gate predicts what each of them adds; the paper distils fresh ones, as sc.recover() may

    Paper      Adaptive Computation Modules: Granular Conditional Computation For Efficient Inference, Wójcik et al., arXiv:2312.10193
    """
    order = "by_importance(of='contribution', dealt=False)"
    return Pipeline((SplitExperts(learners, order, "ridge", "ordered", 0.0, repair="least_squares", density=density),))
