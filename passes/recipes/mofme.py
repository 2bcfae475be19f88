"""MoFME."""

from __future__ import annotations

from sparsify_compiler.passes.moe.share_experts import ShareExperts
from sparsify_compiler.passes.train.ensemble_routers import EnsembleRouters
from sparsify_compiler.pipeline import Pipeline


def mofme(experts: int = 16, top_k: int = 4, samples: int = 5, rate: float = 0.1) -> Pipeline:
    """For training: experts are two vectors each, which scale and shift what one shared FFN gives; the beginning is the dense model.

    Routers average what they make of a row over several dropouts, so that an expert counts as much as they are sure of it

    Paper      Efficient Deweather Mixture-of-Experts with Uncertainty-aware Feature-wise Linear Modulation, Zhang et al., arXiv:2312.16610
    """
    return Pipeline((ShareExperts(experts, "film", "random", f"top_k(k={top_k})"), EnsembleRouters(samples, rate)))
