"""Gamma-MoD."""

from __future__ import annotations

from sparsify_compiler.passes.moe.route_tokens import RouteTokens
from sparsify_compiler.pipeline import Pipeline


def gamma_mod(density: float | None = None, routed: float = 0.75, first: int = 1) -> Pipeline:
    """For training: blocks whose attention maps have the lowest rank run on the tokens that a router scores highest, attention and all.

    Here the router's probability weights the whole block. The paper's one router for all blocks, which instructions may not leave, and the loss by
    which probabilities predict the choice are not in this recipe

    Paper      γ-MoD: Exploring Mixture-of-Depth Adaptation for Multimodal Large Language Models, Luo et al., arXiv:2410.13859
    """
    return Pipeline((RouteTokens(density, routed, "attention_rank", "random", "sigmoid", first),))
