"""Sparsing Law's PPL-p%."""

from __future__ import annotations

from sparsify_compiler.passes.activation.select_inputs import SelectInputs
from sparsify_compiler.pipeline import Pipeline


def sparsing_law(density: float | None = None, targets: tuple[str, ...] = ("ffn:down",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Skip the hidden neurons of every FFN below a threshold of its own, such that all FFNs have the same relative error; needs calibration.

    With Budget(perplexity_rise=0.01) it is PPL-1%: as sparse as raises the perplexity by one per cent, on held-out batches.

    Paper      Sparsing Law: Towards Large Language Models with Greater Activation Sparsity, Luo et al., arXiv:2411.02335
    """
    return Pipeline((SelectInputs("magnitude", "threshold", "equal_error", density, targets=targets, ignore=ignore),))
