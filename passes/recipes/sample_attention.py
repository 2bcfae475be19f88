"""SampleAttention."""

from __future__ import annotations

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.sliding_window import SlidingWindow
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.pipeline import Pipeline


def sample_attention(mass: float = 0.95, step: int = 16, window: float = 0.08, block: int = 64, targets: tuple[str, ...] = KIND,
                     ignore: tuple[str, ...] = ()) -> Pipeline:
    """Attend to a window near by, and to the columns that hold `mass` of what every `step`th query attends to; needs no calibration.

    The window takes that share of what a query sees. Columns are blocks of keys here, tokens in the paper.

    Paper      SampleAttention: Near-Lossless Acceleration of Long Context LLM Inference, Zhu et al., arXiv:2406.15486
    """
    always = (SlidingWindow(block, window), Sinks(block))
    scorer, selector = f"vertical_slash(last=0, step={step}, slashes=False)", f"top_p(mass={mass})"
    return Pipeline((SelectBlocks(always, scorer, selector, block, block, targets=targets, ignore=ignore),))
