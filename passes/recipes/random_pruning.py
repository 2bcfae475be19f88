"""Random pruning."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.pipeline import Pipeline


def random_pruning(density: float | None = None, budget: str = "erk", seed: int | None = None,
                   targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Cut weights at random, small layers less. A baseline, and a start for training.

    Paper      The Unreasonable Effectiveness of Random Pruning, Liu et al., arXiv:2202.02643
    """
    return Pipeline((MaskWeights("random", "unstructured", budget, density, targets, ignore, seed=seed),))
