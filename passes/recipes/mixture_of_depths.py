"""Mixture of depths."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.pipeline import Pipeline


def mixture_of_depths(density: float | None = None, router: str = "ridge", weight: str = "one") -> Pipeline:
    """Each FFN is one expert, which a token runs through or not: by a threshold of its own score, so that it works token by token in generate().

    Without training by the router "ridge"; to train with "random" and the weight "sigmoid". route_tokens() routes around attention, too.

    Paper      Mixture-of-Depths: Dynamically allocating compute in transformer-based language models, Raposo et al., arXiv:2404.02258
    """
    return Pipeline((SplitExperts(1, "contiguous", router, "threshold", 0.0, weight=weight, density=density),))
