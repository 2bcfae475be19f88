"""XMoE."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.penalise_routing import PenaliseRouting
from sparsify_compiler.pipeline import Pipeline


def xmoe(experts: int = 64, density: float | None = None, temperature: float = 1.0, balance: float = 0.01) -> Pipeline:
    """Many small experts, of which a row takes as many as its router's probability needs; for dense models, whose FFNs are divided, and training.

    Paper      Enhancing Efficiency in Sparse Models with Sparser Selection, Yang et al., arXiv:2403.18926
    """
    split = SplitExperts(experts, "contiguous", "ridge", f"top_p(temperature={temperature!r})", 0.0, repair="none", density=density)
    return Pipeline((split, PenaliseRouting("load_balance", balance)))
