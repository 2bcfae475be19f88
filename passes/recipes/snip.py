"""SNIP."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.pipeline import Pipeline


def snip(density: float | None = None, targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Cut the weights of the whole model that change the loss least, |gradient * weight|; needs calibration.

    Paper      SNIP: Single-shot Network Pruning based on Connection Sensitivity, Lee et al., arXiv:1810.02340
    """
    return Pipeline((MaskWeights("gradient_times_weight", "unstructured", "global_threshold", density, targets, ignore),))
