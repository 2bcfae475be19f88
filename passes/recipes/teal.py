"""TEAL."""

from __future__ import annotations

from sparsify_compiler.passes.activation.select_inputs import SelectInputs
from sparsify_compiler.pipeline import Pipeline


def teal(density: float | None = None, budget: str = "uniform", targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Skip the inputs of each layer whose magnitude lies below a calibrated threshold, and their weights; needs calibration, no training.

    budget="block_greedy" is the paper's search within each block, for models that are captured whole.

    Paper      Training-Free Activation Sparsity in Large Language Models, Liu et al., arXiv:2408.14690
    """
    return Pipeline((SelectInputs("magnitude", "threshold", budget, density, targets=targets, ignore=ignore),))
