"""CFSP."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures.columns import Columns
from sparsify_compiler.pipeline import Pipeline


def cfsp(density: float | None = None, targets: tuple[str, ...] = ("ffn:down",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Cut hidden channels of FFNs by their activation norm, more in blocks that turn the residual stream less; needs calibration.

    The columns of the down projection are cut. The rows of up and gate that made these channels then reach nothing, and can be dropped with them.
    The fine-tuning that follows in the paper is left to the user.

    Paper      CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information, Wang et al., arXiv:2409.13199
    """
    return Pipeline((MaskWeights("channel_share", Columns(), "cfsp", density, targets, ignore),))
