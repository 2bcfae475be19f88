"""SR-STE."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.pipeline import Pipeline


def sr_ste(structure: Structure | str = "2:4", density: float | None = None, penalty: float = 2e-4, every: int = 1, steps: int = 1_000_000_000,
           targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training: all weights learn, the largest of each group count, chosen anew after every step; a decay holds the others down.

    With penalty=0 this is the plain straight-through estimator.

    Paper      Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, Zhou et al., arXiv:2102.04010
    """
    start = MaskWeights("magnitude", structure, "uniform", density, targets, ignore)
    return Pipeline((start, MoveMasks(straight_through=True, penalty=penalty, every=every, until=steps)))
