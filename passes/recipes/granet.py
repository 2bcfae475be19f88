"""GraNet."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.pipeline import Pipeline


def granet(density: float | None = None, budget: str = "erk", steps: int = 1000, every: int = 100, fraction: float = 0.5, initial: float = 0.5,
           targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training: gradual magnitude pruning in which as many weights as a `fraction` of the kept are exchanged for those of largest gradient.

    `initial`: the share of the final sparsity that it starts with; 0 is dense. Weights are compared layer by layer, in the paper over all layers.

    Paper      Sparse Training via Boosting Pruning Plasticity with Neuroregeneration, Liu et al., arXiv:2106.10404
    """
    start = MaskWeights("random", "unstructured", budget, density, targets, ignore)
    thinned = f"cubic(end={steps}, initial={float(initial)})"
    return Pipeline((start, MoveMasks(thinned, grow="gradient", fraction=fraction, decay=f"cosine(end={steps})", every=every, until=steps)))
