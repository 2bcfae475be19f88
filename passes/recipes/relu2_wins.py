"""ReLU² Wins."""

from __future__ import annotations

from sparsify_compiler.passes.activation.replace_activation import ReplaceActivation
from sparsify_compiler.pipeline import Pipeline


def relu2_wins(targets: tuple[str, ...] = ("ffn",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training: squared ReLU in every FFN.

    Paper      ReLU² Wins: Discovering Efficient Activation Functions for Sparse LLMs, Zhang et al., arXiv:2402.03804
    """
    return Pipeline((ReplaceActivation("relu2", targets, ignore),))
