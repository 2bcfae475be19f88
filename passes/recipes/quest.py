"""Quest."""

from __future__ import annotations

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.windows import Windows
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.pipeline import Pipeline


def quest(tokens: int = 1024, page: int = 16, block: int = 64, targets: tuple[str, ...] = KIND,
          ignore: tuple[str, ...] = ()) -> Pipeline:
    """Attend to the blocks whose pages have the highest bound of a score, `tokens` keys in all; needs no calibration. The paper decodes with it.

    Paper      Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, Tang et al., arXiv:2406.10774
    """
    always = (Windows(block), Sinks(block))
    scorer, selector = f"page_bounds(page={page})", f"top_k(share=0.0, blocks={-(-tokens // block)})"
    return Pipeline((SelectBlocks(always, scorer, selector, block, block, targets=targets, ignore=ignore),))
