"""Gamma-MoD."""

from __future__ import annotations

from sparsify_compiler.passes.moe.route_tokens import RouteTokens
from sparsify_compiler.passes.train.penalise_routing import PenaliseRouting
from sparsify_compiler.pipeline import Pipeline


def gamma_mod(density: float | None = None, routed: float = 0.75, first: int = 1, keep: str = "", loss: float = 0.01) -> Pipeline:
    """For training: blocks whose attention maps have the lowest rank run on the tokens that one router for all of them scores highest.

    Its probability weights the whole block, here attention, too; a loss lets it tell by itself whether a token was chosen. keep: the input that marks
    tokens, those of an instruction, which come before all others

    Paper      γ-MoD: Exploring Mixture-of-Depth Adaptation for Multimodal Large Language Models, Luo et al., arXiv:2410.13859
    """
    return Pipeline((RouteTokens(density, routed, "attention_rank", "random", "sigmoid", first, True, keep), PenaliseRouting("predicted", loss)))
