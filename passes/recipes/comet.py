"""COMET."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.pipeline import Pipeline


def comet(experts: int = 8, top_k: int = 2, margin: float = 1.0) -> Pipeline:
    """For training: copies of each FFN under one decision tree, of which a row takes the likeliest leaves, weighted with their probabilities.

    The paper takes as many trees as experts are chosen, and searches for the order of the leaves: here one tree has them as they stand

    Paper      COMET: Learning Cardinality Constrained Mixture of Experts with Trees and Local Search, Ibrahim et al., arXiv:2306.02824
    """
    router, selector = f"tree(margin={margin!r})", f"top_k(k={top_k})"
    return Pipeline((SplitExperts(experts, "copies", router, selector, 0.0, "weight_norm", "normalised", "none"),))
