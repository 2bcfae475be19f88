"""Sparse evolutionary training."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.pipeline import Pipeline


def sparse_evolutionary(density: float | None = None, budget: str = "erk", steps: int = 1000, every: int = 100, fraction: float = 0.3,
                        targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training from scratch (SET): random masks of which, every few steps, the smallest weights go and as many random ones come.

    Paper      Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity inspired by Network Science, Mocanu et al.,
               arXiv:1707.04780
    """
    start = MaskWeights("random", "unstructured", budget, density, targets, ignore)
    return Pipeline((start, MoveMasks(grow="random", fraction=fraction, every=every, until=steps)))
