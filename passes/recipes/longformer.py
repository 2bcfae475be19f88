"""Longformer."""

from __future__ import annotations

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.patterns.global_tokens import GlobalTokens
from sparsify_compiler.passes.attention.patterns.sliding_window import SlidingWindow
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.pipeline import Pipeline


def longformer(window: int = 512, tokens: int = 1, targets: tuple[str, ...] = KIND, ignore: tuple[str, ...] = ()) -> Pipeline:
    """Attend to window / 2 tokens on either side, and let the first tokens read all and be read by all; the paper trains with it.

    Paper      Longformer: The Long-Document Transformer, Beltagy et al., arXiv:2004.05150
    """
    return Pipeline((SelectBlocks((SlidingWindow(window // 2 + 1), GlobalTokens(tokens)), dense_below=0, targets=targets, ignore=ignore),))
