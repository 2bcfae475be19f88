"""Mixed heads."""

from __future__ import annotations

from sparsify_compiler.indexer import Indexer
from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.choose_blocks import ChooseBlocks
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.sliding_window import SlidingWindow
from sparsify_compiler.passes.attention.patterns.windows import Windows
from sparsify_compiler.pipeline import Pipeline


def mixed_heads(share: float = 0.5, scorer: str = "gaussian", block: int = 64, targets: tuple[str, ...] = KIND,
                ignore: tuple[str, ...] = ()) -> Pipeline:
    """Give every head a window, or the blocks of highest score, of one of five sizes, or all blocks: the least loss at `share` of the blocks.

    Heads that look near by or at the first tokens pay for those that look anywhere.

    Paper      none: windows by head are MoA's (arXiv:2406.14909), the choice of a pattern by head MInference's (arXiv:2407.02490)
    """
    sizes, always = (2, 4, 8, 12, 16), (Windows(block), Sinks(block))
    near = (Indexer((SlidingWindow((size - 2) * block + 1), Sinks(block)), block_q=block, block_k=block) for size in sizes)
    found = (Indexer(always, scorer, f"top_k(share=0.0, blocks={size})", block, block) for size in sizes)
    every = Indexer((SlidingWindow(1 << 30),), block_q=block, block_k=block)
    return Pipeline((ChooseBlocks((*near, *found, every), share, targets=targets, ignore=ignore),))
