"""CFSP."""

from __future__ import annotations

from sparsify_compiler.passes.prune.remove_channels import RemoveChannels
from sparsify_compiler.pipeline import Pipeline


def cfsp(density: float | None = None, targets: tuple[str, ...] = ("neurons",), ignore: tuple[str, ...] = (), multiple: int = 1) -> Pipeline:
    """Remove neurons of FFNs by their activation norm, more in blocks that turn the residual stream less; needs calibration.

    The rows of up and gate go with the columns of down. The fine-tuning that follows in the paper is left to the user.

    Paper      CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information, Wang et al., arXiv:2409.13199
    """
    return Pipeline((RemoveChannels("channel_share", "cfsp", density, targets, ignore, multiple=multiple),))
