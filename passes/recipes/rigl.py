"""RigL."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.pipeline import Pipeline


def rigl(density: float | None = None, budget: str = "erk", steps: int = 1000, every: int = 100, fraction: float = 0.3,
         targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training from scratch: random masks of which, every few steps, the smallest weights go and those of largest gradient come.

    `steps`, of the last exchange, are three quarters of all in the paper; the share that is exchanged falls along a cosine until then.

    Paper      Rigging the Lottery: Making All Tickets Winners, Evci et al., arXiv:1911.11134
    """
    start = MaskWeights("random", "unstructured", budget, density, targets, ignore)
    return Pipeline((start, MoveMasks(grow="gradient", fraction=fraction, decay=f"cosine(end={steps})", every=every, until=steps)))
