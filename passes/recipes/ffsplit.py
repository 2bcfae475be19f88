"""FFSplit."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.split_neurons import SplitNeurons
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.pipeline import Pipeline


def ffsplit(heavy: float = 0.25, structure: Structure | str = "unstructured", density: float | None = None,
            score: str = "weight_times_input_norm", repair: str = "none") -> Pipeline:
    """Split each FFN into its heavy hitters, which stay, and the rest, whose weights are cut; needs calibration.

    The paper leaves open how each part is compressed; here `structure`, `density`, `score` and `repair` are those of the rest.

    Paper      FFSplit: Split Feed-Forward Network For Optimizing Accuracy-Efficiency Trade-off in Language Model Inference, Liu et al.,
               arXiv:2401.04044
    """
    return Pipeline((SplitNeurons(heavy), MaskWeights(score, structure, "uniform", density, ("re:(.*\\.)?rest",), repair=repair)))
