"""Combiner."""

from __future__ import annotations

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.patterns.windows import Windows
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.pipeline import Pipeline


def combiner(block: int = 64, by: str = "queries", targets: tuple[str, ...] = KIND, ignore: tuple[str, ...] = ()) -> Pipeline:
    """Attend to a query's own block directly, and to every other one by its mean key and what its mean query finds in it.

    For training. `by="keys"` asks by the mean key instead, which decoding with a cache needs.

    Paper      Combiner: Full Attention Transformer with Sparse Computation Cost, Ren et al., arXiv:2107.05768
    """
    rest = f"summaries(by={by!r})".replace("'", "")
    return Pipeline((SelectBlocks((Windows(block),), "", "", block, block, rest=rest, dense_below=0, targets=targets, ignore=ignore),))
