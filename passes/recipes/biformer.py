"""BiFormer."""

from __future__ import annotations

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.pipeline import Pipeline


def biformer(shape: tuple[int, ...] = (14, 14), size: tuple[int, ...] = (2, 2), regions: int = 4, targets: tuple[str, ...] = KIND,
             ignore: tuple[str, ...] = ()) -> Pipeline:
    """Let each region, `size` tokens of an image of `shape`, attend to the `regions` regions whose mean keys are likest to its mean query.

    For training. The paper's depthwise convolution of values is a part of its models, not of this.

    Paper      BiFormer: Vision Transformer with Bi-Level Routing Attention, Zhu et al., arXiv:2303.08810
    """
    block, orders = size[0] * size[1], (f"cuboids(shape={shape!r}, size={size!r})",)
    selector = f"top_k(share=0.0, blocks={regions})"
    return Pipeline((SelectBlocks((), "pooled", selector, block, block, orders, dense_below=0, targets=targets, ignore=ignore),))
