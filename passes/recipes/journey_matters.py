"""The schedule of The Journey Matters."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.pipeline import Pipeline


def journey_matters(density: float | None = None, steps: int = 1000, every: int = 10, targets: tuple[str, ...] = ("linear",),
                    ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training from scratch in `steps` steps: dense for a quarter of them, then thinned out by magnitude until three quarters are done.

    Paper      The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense Scaling Laws, Jin et al., arXiv:2501.12486
    """
    begin, end = steps // 4, steps * 3 // 4
    start = MaskWeights("magnitude", "unstructured", "uniform", density, targets, ignore)
    return Pipeline((start, MoveMasks(f"cubic(start={begin}, end={end})", every=every, until=end)))
