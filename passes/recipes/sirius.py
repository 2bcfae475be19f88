"""Sirius's sparse model."""

from __future__ import annotations

from sparsify_compiler.passes.activation.select_neurons import SelectNeurons
from sparsify_compiler.pipeline import Pipeline


def sirius(density: float | None = None, targets: tuple[str, ...] = ("ffn",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Neurons above a calibrated threshold, as in cats(): a sparse model for sc.generate_corrected(), where the dense one corrects what it writes.

    Paper      Sirius: Contextual Sparsity with Correction for Efficient LLMs, Zhou et al., arXiv:2409.03856
    """
    return Pipeline((SelectNeurons("magnitude", "threshold", density, targets, ignore),))
