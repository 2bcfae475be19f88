"""Double Sparsity."""

from __future__ import annotations

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.windows import Windows
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.pipeline import Pipeline


def double_sparsity(tokens: int = 1024, number: int = 8, block: int = 64, targets: tuple[str, ...] = KIND,
                    ignore: tuple[str, ...] = ()) -> Pipeline:
    """Attend to the blocks, `tokens` keys in all, that score highest in a few channels of each head, which calibration finds.

    The paper picks tokens and decodes with it.

    Paper      Post-Training Sparse Attention with Double Sparsity, Yang et al., arXiv:2408.07092
    """
    always = (Windows(block), Sinks(block))
    scorer, selector = f"channels(number={number})", f"top_k(share=0.0, blocks={-(-tokens // block)})"
    return Pipeline((SelectBlocks(always, scorer, selector, block, block, targets=targets, ignore=ignore),))
