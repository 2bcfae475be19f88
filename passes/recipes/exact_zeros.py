"""Skipping of exact zeros."""

from __future__ import annotations

from sparsify_compiler.passes.activation.select_neurons import SelectNeurons
from sparsify_compiler.pipeline import Pipeline


def exact_zeros(targets: tuple[str, ...] = ("ffn",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Skip the neurons that ReLU and its kin make zero, which changes no output; for models that were trained with them.

    Paper      ReLU Strikes Back: Exploiting Activation Sparsity in Large Language Models, Mirzadeh et al., arXiv:2310.04564
    """
    return Pipeline((SelectNeurons("magnitude", "nonzero", None, targets, ignore),))
