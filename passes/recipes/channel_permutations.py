"""Channel permutations."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.permute_channels import PermuteChannels
from sparsify_compiler.passes.prune.structures.nm import NM
from sparsify_compiler.pipeline import Pipeline


def channel_permutations(n: int = 2, m: int = 4, score: str = "magnitude",
                         targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Order the hidden channels of FFNs so that N:M keeps more, then cut by the same score.

    Paper      none: not on arXiv. Channel Permutations for N:M Sparsity, Pool and Yu, NeurIPS 2021
    """
    return Pipeline((PermuteChannels(score, NM(n, m)), MaskWeights(score, NM(n, m), targets=targets, ignore=ignore)))
