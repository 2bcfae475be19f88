"""PBS-Attn."""

from __future__ import annotations

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.windows import Windows
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.pipeline import Pipeline


def pbs_attn(mass: float = 0.9, segment: int = 256, block: int = 64, targets: tuple[str, ...] = KIND, ignore: tuple[str, ...] = ()) -> Pipeline:
    """Sort the keys of each segment by what the last queries attend to; read a query's own segment, and the blocks that hold `mass` of the rest.

    For prompts: in decoding the keys would be sorted at every step.

    Paper      Sparser Block-Sparse Attention via Token Permutation, Wang et al., arXiv:2510.21270
    """
    always, orders = (Windows(segment), Sinks(block)), (f"by_importance(segment={segment})",)
    return Pipeline((SelectBlocks(always, "pooled", f"top_p(mass={mass}, rest=True)", block, block, orders, targets=targets, ignore=ignore),))
