"""Turbo Sparse."""

from __future__ import annotations

from sparsify_compiler.passes.activation.replace_activation import ReplaceActivation
from sparsify_compiler.pipeline import Pipeline


def turbo_sparse(targets: tuple[str, ...] = ("ffn",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training: ReLU on gate and up of every gated FFN (dReLU).

    Paper      Turbo Sparse: Achieving LLM SOTA Performance with Minimal Activated Parameters, Song et al., arXiv:2406.05955
    """
    return Pipeline((ReplaceActivation("drelu", targets, ignore),))
