"""BigBird."""

from __future__ import annotations

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.patterns.global_tokens import GlobalTokens
from sparsify_compiler.passes.attention.patterns.random_blocks import RandomBlocks
from sparsify_compiler.passes.attention.patterns.sliding_window import SlidingWindow
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.pipeline import Pipeline


def bigbird(block: int = 64, window: int = 3, randoms: int = 3, seed: int = 0, targets: tuple[str, ...] = KIND,
            ignore: tuple[str, ...] = ()) -> Pipeline:
    """Attend to `window` blocks near by, the first block in both directions, and `randoms` random blocks; the paper trains with it.

    Paper      Big Bird: Transformers for Longer Sequences, Zaheer et al., arXiv:2007.14062
    """
    near = SlidingWindow(max(window // 2 * block, 1))
    always = (near, GlobalTokens(block), RandomBlocks(randoms, block, seed))
    return Pipeline((SelectBlocks(always, block_q=block, block_k=block, dense_below=0, targets=targets, ignore=ignore),))
