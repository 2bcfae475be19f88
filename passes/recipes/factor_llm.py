"""FactorLLM."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.pipeline import Pipeline


def factor_llm(experts: int = 4, top_k: int = 1) -> Pipeline:
    """Cut each FFN into experts as the weights stand, unchanged, with a linear router that predicts which of them matters; for training.

    The paper trains the router to agree with what experts give; here it begins fitted to that on calibration, in closed form

    Paper      FactorLLM: Factorizing Knowledge via Mixture of Experts for Large Language Models, Zhao et al., arXiv:2408.11855
    """
    return Pipeline((SplitExperts(experts, "contiguous", "logistic", f"top_k(k={top_k})", 0.0, repair="none"),))
