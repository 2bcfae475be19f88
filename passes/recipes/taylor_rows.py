"""Taylor importance of neurons."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures.rows import Rows
from sparsify_compiler.pipeline import Pipeline


def taylor_rows(size: int = 1, density: float | None = None, targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Cut output rows (runs of `size`) by the squared change of the loss that their weights make, to first order; needs calibration.

    Paper      Importance Estimation for Neural Network Pruning, Molchanov et al., arXiv:1906.10771
    """
    return Pipeline((MaskWeights("taylor", Rows(size), "uniform", density, targets, ignore),))
