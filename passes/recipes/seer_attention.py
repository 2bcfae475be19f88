"""SeerAttention."""

from __future__ import annotations

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.windows import Windows
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.pipeline import Pipeline


def seer_attention(share: float = 0.01, epochs: int = 60, block: int = 64, targets: tuple[str, ...] = KIND,
                   ignore: tuple[str, ...] = ()) -> Pipeline:
    """Attend to the blocks that get a `share` of a small gate's softmax, which is distilled from attention itself on the calibration batches.

    The model's own weights stay. The paper's gate sees queries and keys before rotary positions; here it sees them as attention does.

    Paper      SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs, Gao et al., arXiv:2410.13276
    """
    always = (Windows(block), Sinks(block))
    scorer, selector = f"gate(epochs={epochs})", f"threshold(share={share})"
    return Pipeline((SelectBlocks(always, scorer, selector, block, block, targets=targets, ignore=ignore),))
