"""PESC."""

from __future__ import annotations

from sparsify_compiler.passes.moe.share_experts import ShareExperts
from sparsify_compiler.passes.train.penalise_routing import PenaliseRouting
from sparsify_compiler.pipeline import Pipeline


def pesc(experts: int = 8, top_k: int = 2, rank: int = 64, balance: float = 0.01) -> Pipeline:
    """For training: experts share the dense FFN's weights and differ by an adapter behind it; the beginning is the dense model.

    Paper      Parameter-Efficient Sparsity Crafting from Dense to Mixture-of-Experts, Wu et al., arXiv:2401.02731
    """
    return Pipeline((ShareExperts(experts, f"adapter(rank={rank})", "random", f"top_k(k={top_k})"), PenaliseRouting("load_balance", balance)))
