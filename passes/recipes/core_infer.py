"""CoreInfer."""

from __future__ import annotations

from sparsify_compiler.passes.activation.hold_neurons import HoldNeurons
from sparsify_compiler.pipeline import Pipeline


def core_infer(density: float | None = None, share: float = 0.4, targets: tuple[str, ...] = ("ffn",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Compute, while a text goes on, the neurons of each FFN that most tokens of its prompt held most active; needs no calibration, no training.

    Each token of the prompt votes for the `share` of its positive neurons that are largest (the paper's stability-guided prediction); share=0 lets it
    vote with the square of what each neuron adds to the output.

    Paper      CoreInfer: Accelerating LLM Inference with Semantics-Inspired Adaptive Sparse Activation, Wang et al., arXiv:2410.18311
    """
    return Pipeline((HoldNeurons(density, share, targets=targets, ignore=ignore),))
