"""STen."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures.grouped_nm import GroupedNM
from sparsify_compiler.pipeline import Pipeline


def sten(n: int = 2, m: int = 4, group: int = 4, score: str = "magnitude",
         targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Grouped n:m: every pattern of n in m comes equally often, in a fixed order.

    Paper      STen: Productive and Efficient Sparsity in PyTorch, Ivanov et al., arXiv:2304.07613
    """
    return Pipeline((MaskWeights(score, GroupedNM(n, m, group), targets=targets, ignore=ignore),))
