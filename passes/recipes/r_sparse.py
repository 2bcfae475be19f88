"""R-Sparse."""

from __future__ import annotations

from sparsify_compiler.passes.activation.select_inputs import SelectInputs
from sparsify_compiler.pipeline import Pipeline


def r_sparse(density: float | None = None, share: float = 0.2, budget: str = "uniform", targets: tuple[str, ...] = ("linear",),
             ignore: tuple[str, ...] = ()) -> Pipeline:
    """Skip the inputs of each layer below a calibrated threshold, and let what is skipped through a few directions of the weight; needs calibration.

    `share` as in the repair low_rank: how much of the density the directions of a layer may take.

    Paper      R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference, Zhang et al., arXiv:2504.19449
    """
    return Pipeline((SelectInputs("magnitude", "threshold", budget, density, f"low_rank(share={share})", targets=targets, ignore=ignore),))
