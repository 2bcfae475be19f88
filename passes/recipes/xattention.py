"""XAttention."""

from __future__ import annotations

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.windows import Windows
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.pipeline import Pipeline


def xattention(mass: float = 0.9, stride: int = 8, block: int = 64, targets: tuple[str, ...] = KIND,
               ignore: tuple[str, ...] = ()) -> Pipeline:
    """Attend to the blocks that hold `mass` of the scores along antidiagonals; needs no calibration.

    Paper      XAttention: Block Sparse Attention with Antidiagonal Scoring, Xu et al., arXiv:2503.16428
    """
    always = (Windows(block), Sinks(block))
    scorer, selector = f"antidiagonal(stride={stride})", f"top_p(mass={mass})"
    return Pipeline((SelectBlocks(always, scorer, selector, block, block, targets=targets, ignore=ignore),))
