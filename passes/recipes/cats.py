"""CATS."""

from __future__ import annotations

from sparsify_compiler.passes.activation.select_neurons import SelectNeurons
from sparsify_compiler.pipeline import Pipeline


def cats(density: float | None = None, targets: tuple[str, ...] = ("ffn",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Compute the neurons of each gated FFN whose activated gate lies above a calibrated threshold; needs calibration, no training.

    Paper      CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models, Lee et al., arXiv:2404.08763
    """
    return Pipeline((SelectNeurons("magnitude", "threshold", density, targets, ignore),))
