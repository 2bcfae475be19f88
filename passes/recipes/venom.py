"""VENOM."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures.vnm import VNM
from sparsify_compiler.pipeline import Pipeline


def venom(v: int = 64, n: int = 2, m: int = 8, score: str = "magnitude",
          targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """V:N:M: of m inputs, v rows share a choice of four, and each row keeps n of these.

    Paper      VENOM: A Vectorized N:M Format for Unleashing the Power of Sparse Tensor Cores, Castro et al., arXiv:2310.02065
    """
    return Pipeline((MaskWeights(score, VNM(v, n, m), density=n / m, targets=targets, ignore=ignore),))
