"""ProxyAttn."""

from __future__ import annotations

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.windows import Windows
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.pipeline import Pipeline


def proxy_attn(mass: float = 0.9, proxies: int = 1, rows: int = 4, block: int = 64, targets: tuple[str, ...] = KIND,
               ignore: tuple[str, ...] = ()) -> Pipeline:
    """Attend to the blocks that the mean of all heads finds, each head to as many as hold `mass` of its own attention; needs no calibration.

    Paper      ProxyAttn: Guided Sparse Attention via Representative Heads, Wang et al., arXiv:2509.24745
    """
    always = (Windows(block), Sinks(block))
    scorer, selector = f"proxy_heads(proxies={proxies}, rows={rows})", f"top_p(mass={mass})"
    return Pipeline((SelectBlocks(always, scorer, selector, block, block, targets=targets, ignore=ignore),))
