"""Wanda."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.pipeline import Pipeline


def wanda(structure: Structure | str = "row", density: float | None = None, budget: str = "uniform",
          targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Cut the weights of smallest |weight| times norm of its input, compared within each output row; needs calibration.

    Paper      A Simple and Effective Pruning Approach for Large Language Models, Sun et al., arXiv:2306.11695
    """
    return Pipeline((MaskWeights("weight_times_input_norm", structure, budget, density, targets, ignore),))
