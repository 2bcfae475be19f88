"""Gradual magnitude pruning."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.pipeline import Pipeline


def gmp(density: float | None = None, structure: Structure | str = "unstructured", budget: str = "uniform", steps: int = 1000, every: int = 100,
        targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training: from dense to `density` along a cubic, the smallest weights going every few steps; nothing comes back. `steps`: of the last cut.

    Paper      To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression, Zhu and Gupta, arXiv:1710.01878
    """
    start = MaskWeights("magnitude", structure, budget, density, targets, ignore)
    return Pipeline((start, MoveMasks(f"cubic(end={steps})", every=every, until=steps)))
