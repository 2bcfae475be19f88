"""NSA."""

from __future__ import annotations

from sparsify_compiler.indexer import Indexer
from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.branch_attention import BranchAttention
from sparsify_compiler.passes.attention.branches.compressed import Compressed
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.sliding_window import SlidingWindow
from sparsify_compiler.passes.attention.patterns.windows import Windows
from sparsify_compiler.pipeline import Pipeline


def nsa(length: int = 32, stride: int = 16, block: int = 64, blocks: int = 16, window: int = 512, block_q: int = 1, targets: tuple[str, ...] = KIND,
        ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training: compressed keys, the blocks that these point to (the first and the last two among them), and a window, added up by gates.

    A query chooses for itself, and all heads of a group alike; block_q queries may choose together, who then know of each other. Keys and values are
    the model's own in all three branches, and gates read the query; in the paper each branch has its own, and gates read the layer's input.

    Paper      Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention, Yuan et al., arXiv:2502.11089
    """
    near = (Sinks(block), Windows(block, before=1))
    scorer, selector = f"compressed_keys(length={length}, stride={stride})", f"top_k(share=0.0, blocks={blocks})"
    parts = (Compressed(length, stride), Indexer(near, scorer, selector, block_q, block), Indexer((SlidingWindow(window),)))
    return Pipeline((BranchAttention(parts, targets=targets, ignore=ignore),))
