"""MInference."""

from __future__ import annotations

from sparsify_compiler.indexer import Indexer
from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.choose_blocks import ChooseBlocks
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.sliding_window import SlidingWindow
from sparsify_compiler.passes.attention.patterns.windows import Windows
from sparsify_compiler.pipeline import Pipeline


def minference(tokens: int = 1024, last: int = 64, block: int = 64, targets: tuple[str, ...] = KIND,
               ignore: tuple[str, ...] = ()) -> Pipeline:
    """Give every head a window and sinks, or columns and diagonals, or blocks by their means: whichever is nearest to dense attention.

    Each query reads `tokens` keys, so that short texts stay dense.

    Paper      MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention, Jiang et al., arXiv:2407.02490
    """
    near, always = (SlidingWindow(max(tokens - block, 1)), Sinks(block)), (Windows(block), Sinks(block))
    scorers = (f"vertical_slash(last={last})", "pooled")
    selector = f"top_k(share=0.0, blocks={-(-tokens // block)})"
    dynamic = tuple(Indexer(always, scorer, selector, block, block) for scorer in scorers)
    return Pipeline((ChooseBlocks((Indexer(near, block_q=block, block_k=block), *dynamic), targets=targets, ignore=ignore),))
