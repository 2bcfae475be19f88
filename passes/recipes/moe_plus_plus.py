"""MoE++."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.penalise_routing import PenaliseRouting
from sparsify_compiler.pipeline import Pipeline


def moe_plus_plus(experts: int = 8, top_k: int = 2, constants: int = 2, balance: float = 0.01, tau: float = 0.75) -> Pipeline:
    """For training: beside experts that are FFNs, here copies of the dense one, those that cost nothing: zero, copy and constants.

    Routers hand their scores on to the next one; weights of a row sum up to 1 over all of its experts but the zero one

    Paper      MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts, Jin et al., arXiv:2410.07348
    """
    free = (*["constant"] * constants, "copy", "zero")
    split = SplitExperts(experts, "copies", "random", f"top_k(k={top_k})", 0.0, "weight_norm", "normalised", "none", free=free, residual=True)
    return Pipeline((split, PenaliseRouting(f"load_balance(free={len(free)}, tau={tau!r})", balance)))
