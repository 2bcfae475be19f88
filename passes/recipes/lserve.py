"""LServe."""

from __future__ import annotations

from sparsify_compiler.indexer import Indexer
from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.choose_blocks import ChooseBlocks
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.sliding_window import SlidingWindow
from sparsify_compiler.passes.attention.patterns.windows import Windows
from sparsify_compiler.pipeline import Pipeline


def lserve(tokens: int = 1024, window: int = 256, streaming: float = 0.5, page: int = 16, block: int = 64, targets: tuple[str, ...] = KIND,
           ignore: tuple[str, ...] = ()) -> Pipeline:
    """Let a share of the heads, those that lose least by it, attend to a window and sinks only, and the others to the pages of highest bound.

    Paper      LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention, Yang et al., arXiv:2502.14866
    """
    near = Indexer((SlidingWindow(window), Sinks(block)), block_q=block, block_k=block)
    selector = f"top_k(share=0.0, blocks={-(-tokens // block)})"
    pages = Indexer((Windows(block), Sinks(block)), f"page_bounds(page={page})", selector, block, block)
    return Pipeline((ChooseBlocks((near, pages), quotas=(streaming, 1 - streaming), targets=targets, ignore=ignore),))
