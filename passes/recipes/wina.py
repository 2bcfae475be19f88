"""WINA."""

from __future__ import annotations

from sparsify_compiler.passes.activation.select_inputs import SelectInputs
from sparsify_compiler.pipeline import Pipeline


def wina(density: float | None = None, selector: str = "top_k", budget: str = "greedy", targets: tuple[str, ...] = ("linear",),
         ignore: tuple[str, ...] = ()) -> Pipeline:
    """Select the inputs of highest magnitude times length of the weights that read them; needs calibration for the budget only.

    Paper      WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference, Chen et al., arXiv:2505.19427
    """
    return Pipeline((SelectInputs("weight_norm", selector, budget, density, targets=targets, ignore=ignore),))
