"""FTWT."""

from __future__ import annotations

from sparsify_compiler.passes.activation.predict_filters import PredictFilters
from sparsify_compiler.passes.reparam.fold_batchnorm import FoldBatchnorm
from sparsify_compiler.pipeline import Pipeline


def ftwt(mass: float = 0.9, weight: float = 1.0, least: int = 8, targets: tuple[str, ...] = ("conv",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training a CNN on: each convolution learns to tell from its input which filters hold `mass` of an image's maps, and skips the rest.

    Batch norms are folded, so that maps are what activations see. No kernel skips the filters yet.

    Paper      Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask Prediction, Elkerdawy et al., arXiv:2110.08232
    """
    return Pipeline((FoldBatchnorm(), PredictFilters(mass, weight, least=least, targets=targets, ignore=ignore)))
