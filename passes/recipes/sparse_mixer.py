"""SparseMixer."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.penalise_routing import PenaliseRouting
from sparsify_compiler.passes.train.route_gradients import RouteGradients
from sparsify_compiler.pipeline import Pipeline


def sparse_mixer(experts: int = 8, balance: float = 0.01, near: float = 0.0) -> Pipeline:
    """For training: copies of each FFN, of which one is drawn by the router's probabilities, with a gradient for that choice.

    Paper      Sparse Backpropagation for MoE Training, Liu et al., arXiv:2310.00811
    """
    split = SplitExperts(experts, "copies", "random", "top_k(k=1)", 0.0, "weight_norm", "softmax", "none")
    return Pipeline((split, PenaliseRouting("load_balance", balance), RouteGradients(f"sparse_mixer(near={near!r})")))
