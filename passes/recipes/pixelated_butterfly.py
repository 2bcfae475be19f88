"""Pixelated Butterfly, for attention."""

from __future__ import annotations

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.patterns.butterfly import Butterfly
from sparsify_compiler.passes.attention.patterns.global_tokens import GlobalTokens
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.pipeline import Pipeline


def pixelated_butterfly(block: int = 32, levels: int | None = None, targets: tuple[str, ...] = KIND, ignore: tuple[str, ...] = ()) -> Pipeline:
    """Attend to the blocks of a flat butterfly, and to a first block that stands for the low-rank part; the paper trains with it.

    Paper      Pixelated Butterfly: Simple and Efficient Sparse Training for Neural Network Models, Dao et al., arXiv:2112.00029
    """
    always = (Butterfly(levels, block), GlobalTokens(block))
    return Pipeline((SelectBlocks(always, block_q=block, block_k=block, dense_below=0, targets=targets, ignore=ignore),))
