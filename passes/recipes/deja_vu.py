"""Deja Vu."""

from __future__ import annotations

from sparsify_compiler.passes.activation.predict_neurons import PredictNeurons
from sparsify_compiler.pipeline import Pipeline


def deja_vu(density: float | None = None, rank: int = 128, epochs: int = 6, targets: tuple[str, ...] = ("ffn",),
            ignore: tuple[str, ...] = ()) -> Pipeline:
    """Predict the neurons of each FFN that matter from what it reads, by a small network each; targets=("ffn", "attention") for heads too.

    Paper      Deja Vu: Contextual Sparsity for Efficient LLMs at Inference Time, Liu et al., arXiv:2310.17157
    """
    return Pipeline((PredictNeurons(density, "site", "magnitude", rank, epochs, targets=targets, ignore=ignore),))
