"""COMET."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.penalise_routing import PenaliseRouting
from sparsify_compiler.passes.train.settle_order import SettleOrder
from sparsify_compiler.pipeline import Pipeline


def comet(experts: int = 8, top_k: int = 2, margin: float = 1.0, outside: float = 0.01, steps: int = 1000) -> Pipeline:
    """For training: copies of each FFN under as many decision trees as a row takes experts, each of which brings it to about one leaf.

    Rows take the likeliest experts, so that there never are more; a loss brings the trees to make that choice alone, by splits that are a whole yes
    or no (the paper's loss is the entropy of each tree's leaves). Which expert stands at which leaf is learnt in the first steps.

    Paper      COMET: Learning Cardinality Constrained Mixture of Experts with Trees and Local Search, Ibrahim et al., arXiv:2306.02824
    """
    router = f"tree(margin={margin!r}, trees={top_k}, order=True)"
    split = SplitExperts(experts, "copies", router, f"top_k(k={top_k})", 0.0, "weight_norm", "normalised", "none")
    return Pipeline((split, SettleOrder(steps), PenaliseRouting("outside", outside)))
