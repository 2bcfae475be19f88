"""Sparse Upcycling."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.penalise_routing import PenaliseRouting
from sparsify_compiler.pipeline import Pipeline


def sparse_upcycling(experts: int = 8, top_k: int = 2, balance: float = 0.01) -> Pipeline:
    """For training: every expert begins as a copy of the FFN, and weights that sum up to 1 make the beginning the dense model.

    Paper      Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints, Komatsuzaki et al., arXiv:2212.05055
    """
    split = SplitExperts(experts, "copies", "random", f"top_k(k={top_k})", 0.0, "weight_norm", "normalised", "none")
    return Pipeline((split, PenaliseRouting("load_balance", balance)))
