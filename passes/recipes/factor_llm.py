"""FactorLLM."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.penalise_routing import PenaliseRouting
from sparsify_compiler.pipeline import Pipeline


def factor_llm(experts: int = 4, top_k: int = 1, loss: float = 1.0) -> Pipeline:
    """Cut each FFN into experts as the weights stand, unchanged, with a linear router that predicts which of them matter; for training.

    The router begins fitted to what experts give on calibration, in closed form, and a loss lets it follow them while they are trained

    Paper      FactorLLM: Factorizing Knowledge via Mixture of Experts for Large Language Models, Zhao et al., arXiv:2408.11855
    """
    split = SplitExperts(experts, "contiguous", "logistic", f"top_k(k={top_k})", 0.0, repair="none")
    return Pipeline((split, PenaliseRouting("prior_approximate", loss)))
