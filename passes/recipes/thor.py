"""THOR."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.penalise_disagreement import PenaliseDisagreement
from sparsify_compiler.passes.train.route_gradients import RouteGradients
from sparsify_compiler.pipeline import Pipeline


def thor(experts: int = 4, consistency: float = 1.0) -> Pipeline:
    """For training: copies of each FFN, one of which is drawn for every row; afterwards rows choose by the sides of random planes that they lie on.

    Two passes over a batch, which draw different experts, are to give alike: run the model twice before each backward()

    Paper      Taming Sparsely Activated Transformer with Stochastic Experts, Zuo et al., arXiv:2110.04260
    """
    split = SplitExperts(experts, "copies", "hashed", "top_k(k=1)", 0.0, "weight_norm", repair="none")
    return Pipeline((split, RouteGradients("dice"), PenaliseDisagreement(weight=consistency)))
