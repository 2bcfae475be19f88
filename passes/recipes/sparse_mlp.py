"""Sparse-MLP."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.penalise_routing import PenaliseRouting
from sparsify_compiler.pipeline import Pipeline


def sparse_mlp(experts: int = 4, top_k: int = 2, balance: float = 0.01) -> Pipeline:
    """For training: the MLPs of a Mixer, over patches and over channels alike, become copies that a row or a channel chooses from.

    Every FFN of the graph is one: of those that mix tokens a row is a channel. The paper's layers that change the two sizes in between are not in
    this recipe

    Paper      Cross-token Modeling with Conditional Computation, Lou et al., arXiv:2109.02008
    """
    split = SplitExperts(experts, "copies", "random", f"top_k(k={top_k})", 0.0, "weight_norm", "normalised", "none")
    return Pipeline((split, PenaliseRouting("importance", balance)))
