"""Twilight."""

from __future__ import annotations

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.windows import Windows
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.pipeline import Pipeline


def twilight(mass: float = 0.9, rows: int = 4, block: int = 64, targets: tuple[str, ...] = KIND,
             ignore: tuple[str, ...] = ()) -> Pipeline:
    """Attend to the fewest blocks that hold `mass` of the attention of a few rows of each block of queries; needs no calibration.

    The paper estimates with keys in 4 bits; the exact shares of sampled rows stand for that here.

    Paper      Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning, Lin et al., arXiv:2502.02770
    """
    always = (Windows(block), Sinks(block))
    scorer, selector = f"sampled_rows(rows={rows})", f"top_p(mass={mass})"
    return Pipeline((SelectBlocks(always, scorer, selector, block, block, targets=targets, ignore=ignore),))
