"""Sparse momentum."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.pipeline import Pipeline


def sparse_momentum(density: float | None = None, budget: str = "uniform", steps: int = 1000, every: int = 100, fraction: float = 0.5,
                    smooth: float = 0.9, targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training from scratch: random masks; the smallest weights go, those of largest momentum come, most in layers where it is large on average.

    The momentum is an average of gradients of its own, whatever the optimizer. Exchanges come once an epoch in the paper.

    Paper      Sparse Networks from Scratch: Faster Training without Losing Performance, Dettmers and Zettlemoyer, arXiv:1907.04840
    """
    start = MaskWeights("random", "unstructured", budget, density, targets, ignore)
    moved = MoveMasks(grow="gradient", fraction=fraction, decay=f"cosine(end={steps})", every=every, until=steps, smooth=smooth, redistribute=True)
    return Pipeline((start, moved))
