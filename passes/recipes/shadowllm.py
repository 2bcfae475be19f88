"""ShadowLLM."""

from __future__ import annotations

from sparsify_compiler.passes.activation.predict_neurons import PredictNeurons
from sparsify_compiler.pipeline import Pipeline


def shadowllm(density: float | None = None, rank: int = 256, epochs: int = 6, targets: tuple[str, ...] = ("ffn",),
              ignore: tuple[str, ...] = ()) -> Pipeline:
    """Predict the neurons of all FFNs by one network, from what the first one reads, trained to find those that the loss's gradient says matter.

    Paper      ShadowLLM: Predictor-based Contextual Sparsity for Large Language Models, Akhauri et al., arXiv:2406.16635
    """
    return Pipeline((PredictNeurons(density, "model", "gradient", rank, epochs, targets=targets, ignore=ignore),))
