"""MoA, mixture of sparse attention."""

from __future__ import annotations

from sparsify_compiler.indexer import Indexer
from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.choose_blocks import ChooseBlocks
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.sliding_window import SlidingWindow
from sparsify_compiler.pipeline import Pipeline


def moa(share: float = 0.5, sinks: int = 64, block: int = 64, targets: tuple[str, ...] = KIND,
        ignore: tuple[str, ...] = ()) -> Pipeline:
    """Give every head a window of its own, of a length that grows with the text at a rate of its own, so that all read `share` of the blocks.

    Paper      MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression, Fu et al., arXiv:2406.14909
    """
    rules = [(window, growth) for window in (64, 256) for growth in (0.0, 0.125, 0.25, 0.5, 1.0)]
    choices = tuple(Indexer((SlidingWindow(*rule), Sinks(sinks)), block_q=block, block_k=block) for rule in rules)
    return Pipeline((ChooseBlocks(choices, share, targets=targets, ignore=ignore),))
