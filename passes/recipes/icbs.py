"""iCBS."""

from __future__ import annotations

from typing import Literal

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.pipeline import Pipeline


def icbs(structure: Structure | str = "row", density: float | None = None, budget: str = "uniform",
         targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = (), inputs: Literal["dense", "block", "pruned"] = "block") -> Pipeline:
    """Wanda's masks, then weights are exchanged in pairs until no pair lowers the error of the layer's output; needs calibration.

    The paper does this with the second-order error of the model's loss, and anneals; see the repair `exchange`. No weight changes its value.

    Paper      Scalable Iterative Pruning of Large Language and Vision Models Using Block Coordinate Descent, arXiv:2411.17796
    """
    return Pipeline((MaskWeights("weight_times_input_norm", structure, budget, density, targets, ignore, repair="exchange", inputs=inputs),))
