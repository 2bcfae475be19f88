"""SpargeAttn."""

from __future__ import annotations

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.windows import Windows
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.pipeline import Pipeline


def sparge_attn(mass: float = 0.9, similarity: float = 0.4, block: int = 64, targets: tuple[str, ...] = KIND,
                ignore: tuple[str, ...] = ()) -> Pipeline:
    """Attend to the blocks that hold `mass` by their means, and to all blocks whose means say little; needs no calibration.

    The paper's second stage skips, in the kernel, values of blocks whose scores lie far below the largest so far. It is left out: a kernel takes many
    blocks at once, and among those that the first stage leaves there are hardly any.

    Paper      SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference, Zhang et al., arXiv:2502.18137
    """
    always = (Windows(block), Sinks(block))
    scorer, selector = f"pooled(similarity={similarity})", f"top_p(mass={mass})"
    return Pipeline((SelectBlocks(always, scorer, selector, block, block, targets=targets, ignore=ignore),))
