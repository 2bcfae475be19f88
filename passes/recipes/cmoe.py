"""CMoE."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.pipeline import Pipeline


def cmoe(experts: int = 16, shared: float = 0.25, density: float | None = None) -> Pipeline:
    """Carve experts out of each FFN: the neurons active most often are shared, the others grouped by activity, and one of each group speaks for it.

    Paper      CMoE: Converting Mixture-of-Experts from Dense to Accelerate LLM Inference, Pei et al., arXiv:2502.04416
    """
    made = SplitExperts(experts, "activity_kmeans", "representative", "top_k", shared, "activation_rate", "scaled", "none", density=density)
    return Pipeline((made,))
