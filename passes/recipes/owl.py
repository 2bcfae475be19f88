"""OWL."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.pipeline import Pipeline


def owl(structure: Structure | str = "row", density: float | None = None, score: str = "weight_times_input_norm",
        targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Cut as Wanda does, and keep more in blocks with more outliers; needs calibration.

    Paper      Outlier Weighed Layerwise Sparsity (OWL), Yin et al., arXiv:2310.05175
    """
    return Pipeline((MaskWeights(score, structure, "owl", density, targets, ignore),))
