"""OATS."""

from __future__ import annotations

from typing import Literal

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.pipeline import Pipeline


def oats(structure: Structure | str = "row", density: float | None = None, share: float = 0.25, rounds: int = 20,
         targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = (),
         inputs: Literal["dense", "block", "pruned"] = "block") -> Pipeline:
    """Each weight becomes a sparse one plus one of low rank, by alternating thresholding on inputs of norm one; needs calibration.

    `share` of the numbers that are kept are those of the low-rank part, which runs as two dense layers beside the packed one.

    Paper      OATS: Outlier-Aware Pruning Through Sparse and Low Rank Decomposition, Zhang and Papyan, arXiv:2409.13652
    """
    repair = f"sparse_low_rank(share={share}, rounds={rounds})"
    return Pipeline((MaskWeights("repair", structure, density=density, targets=targets, ignore=ignore, repair=repair, inputs=inputs),))
