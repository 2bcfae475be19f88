"""DEFT."""

from __future__ import annotations

from sparsify_compiler.passes.train.penalise_activations import PenaliseActivations
from sparsify_compiler.pipeline import Pipeline


def deft(weight: float = 0.1, loss: str = "density", targets: tuple[str, ...] = ("ffn",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For fine-tuning: a term of the loss that counts, smoothly, the neurons of each FFN that are not zero. The activation stays.

    Paper      From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in Transformers, Runwal et al., arXiv:2402.01911
    """
    return Pipeline((PenaliseActivations(loss, weight, targets=targets, ignore=ignore),))
