"""BDWP."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures.nm import NM
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.pipeline import Pipeline


def bdwp(n: int = 2, m: int = 8, padded: bool = False, targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training: all weights learn; layers compute with the n largest of m inputs, gradients go back through the n largest of m outputs.

    The accelerator of the paper (SAT), on which both products are faster, is out of reach: here the way back saves no time.

    Paper      Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and Dataflow Co-Design, Fang et al., arXiv:2309.13015
    """
    start = MaskWeights("magnitude", NM(n, m, padded=padded), "uniform", n / m, targets=targets, ignore=ignore)
    back = NM(n, m, along="outputs", padded=padded)
    return Pipeline((start, MoveMasks(straight_through=True, backward=back, every=1, until=1_000_000_000)))
