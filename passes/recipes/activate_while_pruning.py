"""Activate-While-Pruning (AP)."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.pipeline import Pipeline


def activate_while_pruning(density: float | None = None, share: float = 0.1, budget: str = "uniform", steps: int = 1000, every: int = 100,
                           targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training with ReLU: weights go by and by, a `share` of them negative ones that training has moved least, the others the smallest.

    Weights go on as they are after a cut; the paper's own experiments rewind them and train again, as sc.averaged_cycles() can.

    Paper      AP: Selective Activation for De-sparsifying Pruned Neural Networks, Liu et al., arXiv:2212.06145
    """
    start = MaskWeights("magnitude", "unstructured", budget, density, targets, ignore)
    dropped = f"unmoved_negatives(share={float(share)})"
    return Pipeline((start, MoveMasks(f"cubic(end={steps})", drop=dropped, every=every, until=steps)))
