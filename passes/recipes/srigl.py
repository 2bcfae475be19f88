"""SRigL."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.pipeline import Pipeline


def srigl(density: float | None = None, budget: str = "erk", steps: int = 1000, every: int = 100, fraction: float = 0.3, least: float = 0.3,
          targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training from scratch: RigL with as many inputs for every neuron, and without the neurons of which less than the share `least` matters.

    Paper      Dynamic Sparse Training with Structured Sparsity, Lasby et al., arXiv:2305.02299
    """
    start = MaskWeights("random", "fan_in", budget, density, targets, ignore)
    moved = MoveMasks(grow="gradient", fraction=fraction, decay=f"cosine(end={steps})", every=every, until=steps, least=least)
    return Pipeline((start, moved))
