"""VersatileFFN."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.penalise_routing import PenaliseRouting
from sparsify_compiler.pipeline import Pipeline


def versatile_ffn(experts: int = 8, top_k: int = 2, balance: float = 0.01) -> Pipeline:
    """For training: experts are overlapping slices of the FFN, of which a row takes those of highest probability: the paper's width path.

    Each slice is a copy, where the paper's share their weights; its depth path, which runs the FFN several times over for hard rows, and the gate
    between both are not in this recipe

    Paper      VersatileFFN: Achieving Parameter Efficiency in LLMs via Adaptive Wide-and-Deep Reuse, arXiv:2512.14531
    """
    split = SplitExperts(experts, "slices", "random", f"top_k(k={top_k})", 0.0, "weight_norm", "normalised", "none")
    return Pipeline((split, PenaliseRouting("load_balance", balance)))
