"""Constant fan-in."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.pipeline import Pipeline


def constant_fan_in(density: float | None = None, score: str = "magnitude", budget: str = "erk",
                    targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Keep the same number of inputs for every output of a layer, small layers more: the structure of SRigL in one shot, without its training.

    Paper      Dynamic Sparse Training with Structured Sparsity, Lasby et al., arXiv:2305.02299
    """
    return Pipeline((MaskWeights(score, "fan_in", budget, density, targets, ignore),))
