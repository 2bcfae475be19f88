"""WGSEF."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.passes.train.shrink_groups import ShrinkGroups
from sparsify_compiler.pipeline import Pipeline


def wgsef(density: float | None = None, structure: Structure | str = "Rows()", budget: str = "uniform", steps: int = 1000, strength: float = 1e-3,
          targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training: after every step groups of weights (rows, columns, blocks, filters) shrink, the weakest to 0; at `steps` those are cut.

    Paper      Learning k-Level Structured Sparse Neural Networks Using Group Envelope Regularization, Refael et al., arXiv:2212.12921
    """
    start = MaskWeights("magnitude", structure, budget, density, targets, ignore)
    shrinks = ShrinkGroups(strength, f"line(start={max(steps - 1, 0)}, end={max(steps, 1)})")
    return Pipeline((start, MoveMasks(f"after(start={steps})", every=steps, until=steps), shrinks))
