"""InfLLM-V2."""

from __future__ import annotations

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.sliding_window import SlidingWindow
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.pipeline import Pipeline


def infllm_v2(blocks: int = 96, window: int = 2048, length: int = 32, stride: int = 16, block: int = 64, block_q: int = 1, dense_below: int = 8192,
              targets: tuple[str, ...] = KIND, ignore: tuple[str, ...] = ()) -> Pipeline:
    """Short texts densely; long ones by the first block, a window, and the blocks whose mean windows of keys all heads of a group attend to most.

    Nothing is learned but the model's own weights, by training with it. A query chooses for itself; block_q queries may choose together.

    Paper      InfLLM-V2: Dense-Sparse Switchable Attention for Seamless Short-to-Long Adaptation, Zhao et al., arXiv:2509.24663
    """
    always = (Sinks(block), SlidingWindow(window))
    scorer, selector = f"mean_windows(length={length}, stride={stride})", f"top_k(share=0.0, blocks={blocks})"
    return Pipeline((SelectBlocks(always, scorer, selector, block_q, block, dense_below=dense_below, targets=targets, ignore=ignore),))
