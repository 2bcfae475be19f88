"""Essential sparsity."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.pipeline import Pipeline


def essential_sparsity(density: float | None = None, targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Cut the weights of smallest magnitude of the whole model, in one shot.

    Paper      The Emergence of Essential Sparsity in Large Pre-trained Models: The Weights that Matter, Jaiswal et al., arXiv:2306.03805
    """
    return Pipeline((MaskWeights("magnitude", "unstructured", "global_threshold", density, targets, ignore),))
