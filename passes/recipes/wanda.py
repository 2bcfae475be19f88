"""Wanda."""

from __future__ import annotations

from typing import Literal

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.pipeline import Pipeline


def wanda(structure: Structure | str = "row", density: float | None = None, budget: str = "uniform",
          targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = (),
          inputs: Literal["dense", "block", "pruned"] = "dense") -> Pipeline:
    """Cut the weights of smallest |weight| times norm of its input, compared within each output row; needs calibration.

    `inputs` as in mask_weights: "block" is the authors' order; "dense", one run of the dense model for all layers, also takes models that cannot
    be captured whole.

    Paper      A Simple and Effective Pruning Approach for Large Language Models, Sun et al., arXiv:2306.11695
    """
    return Pipeline((MaskWeights("weight_times_input_norm", structure, budget, density, targets, ignore, inputs=inputs),))
