"""SparseAdapter."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.train.add_adapters import AddAdapters
from sparsify_compiler.pipeline import Pipeline


def sparse_adapter(density: float = 0.4, rank: int = 64, score: str = "gradient_times_weight", targets: tuple[str, ...] = ("linear",),
                   ignore: tuple[str, ...] = (), seed: int = 0) -> Pipeline:
    """For fine-tuning: a frozen model with small networks behind its layers, that are cut before they train; needs calibration for the score, SNIP's.

    Wide ones at a low density (Large-Sparse) have as many weights as narrow ones, and do more. The paper puts two in each block, behind
    attention and FFN: name their last layers in targets. score="magnitude" and "random" are others of its.

    Paper      SparseAdapter: An Easy Approach for Improving the Parameter-Efficiency of Adapters, He et al., arXiv:2210.04284
    """
    behind = AddAdapters(f"bottleneck(rank={rank})", seed=seed, targets=targets, ignore=ignore)
    return Pipeline((behind, MaskWeights(score, "unstructured", "global_threshold", density, ("*.bottleneck_*",))))
