"""MInference."""

from __future__ import annotations

from sparsify_compiler.indexer import Indexer
from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.choose_blocks import ChooseBlocks
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.sliding_window import SlidingWindow
from sparsify_compiler.passes.attention.patterns.windows import Windows
from sparsify_compiler.pipeline import Pipeline


def minference(share: float = 0.5, last: int = 64, block: int = 64, targets: tuple[str, ...] = KIND,
               ignore: tuple[str, ...] = ()) -> Pipeline:
    """Give every head a window and sinks, or columns and diagonals, or blocks by their means: whichever is nearest to dense attention.

    Each reads `share` of what dense attention does.

    Paper      MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention, Jiang et al., arXiv:2407.02490
    """
    near, always = (SlidingWindow(block, share), Sinks(block)), (Windows(block), Sinks(block))
    scorers = (f"vertical_slash(last={last})", "pooled")
    dynamic = tuple(Indexer(always, scorer, f"top_k(share={share})", block, block) for scorer in scorers)
    return Pipeline((ChooseBlocks((Indexer(near, block_q=block, block_k=block), *dynamic), targets=targets, ignore=ignore),))
