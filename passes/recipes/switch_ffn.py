"""Switch FFN."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.penalise_routing import PenaliseRouting
from sparsify_compiler.pipeline import Pipeline


def switch_ffn(experts: int = 8, balance: float = 0.01, targets: tuple[str, ...] = ("ffn",)) -> Pipeline:
    """For training: chosen FFNs become copies, of which a row takes the one of highest probability, times that probability.

    Paper      Build a Robust QA System with Transformer-based Mixture of Experts, arXiv:2204.09598, with the router of Switch, arXiv:2101.03961
    """
    split = SplitExperts(experts, "copies", "random", "top_k(k=1)", 0.0, "weight_norm", "softmax", "none", targets=targets)
    return Pipeline((split, PenaliseRouting("load_balance", balance)))
