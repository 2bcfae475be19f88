"""Filter norms."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures.rows import Rows
from sparsify_compiler.pipeline import Pipeline


def filter_norms(density: float | None = None, targets: tuple[str, ...] = ("*",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Cut whole filters and output rows of smallest L1 norm.

    Paper      Pruning Filters for Efficient ConvNets, Li et al., arXiv:1608.08710
    """
    return Pipeline((MaskWeights("magnitude", Rows(), "uniform", density, targets, ignore),))
