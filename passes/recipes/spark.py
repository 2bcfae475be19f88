"""Spark Transformer's selection."""

from __future__ import annotations

from sparsify_compiler.passes.activation.select_inputs import SelectInputs
from sparsify_compiler.pipeline import Pipeline


def spark(density: float | None = None, targets: tuple[str, ...] = ("ffn:down",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Keep the hidden neurons of every FFN that lie some standard deviations above the row's mean: a top-k without sorting; needs calibration.

    Its predictor, which saves the gate as well, comes with pretraining and is not here.

    Paper      Spark Transformer: Reactivating Sparsity in FFN and Attention, You et al., arXiv:2506.06644
    """
    return Pipeline((SelectInputs("magnitude", "statistical_top_k", "uniform", density, targets=targets, ignore=ignore),))
