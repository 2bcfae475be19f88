"""CHESS."""

from __future__ import annotations

from sparsify_compiler.passes.activation.select_inputs import SelectInputs
from sparsify_compiler.passes.activation.select_neurons import SelectNeurons
from sparsify_compiler.pipeline import Pipeline


def chess(density: float | None = None, attention: tuple[str, ...] = (), targets: tuple[str, ...] = ("ffn",),
          ignore: tuple[str, ...] = ()) -> Pipeline:
    """A threshold a channel for the neurons of gated FFNs, and one a layer for the inputs of selected projections of attention; needs calibration.

    `attention` selects those: ("attention:q", "attention:out"), the large ones under grouped queries; where a model is captured in parts, inside
    generate(), name them by path.

    Paper      CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective Sparsification, He et al., arXiv:2409.01366
    """
    neurons = Pipeline((SelectNeurons("partner_mean", "threshold", density, targets, ignore),))
    return neurons | SelectInputs("magnitude", "threshold", "uniform", density, targets=attention, ignore=ignore) if attention else neurons
