"""StreamingLLM."""

from __future__ import annotations

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.sliding_window import SlidingWindow
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.pipeline import Pipeline


def streaming(window: int = 512, sinks: int = 64, block: int = 64, targets: tuple[str, ...] = KIND, ignore: tuple[str, ...] = ()) -> Pipeline:
    """Attend to the first tokens and to a window of the last ones; needs no calibration.

    Paper      Efficient Streaming Language Models with Attention Sinks, Xiao et al., arXiv:2309.17453
    """
    return Pipeline((SelectBlocks((SlidingWindow(window), Sinks(sinks)), block_q=block, block_k=block, targets=targets, ignore=ignore),))
