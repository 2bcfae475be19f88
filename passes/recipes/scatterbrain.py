"""Scatterbrain."""

from __future__ import annotations

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.windows import Windows
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.pipeline import Pipeline


def scatterbrain(share: float = 0.25, features: int = 128, block: int = 64, targets: tuple[str, ...] = KIND,
                 ignore: tuple[str, ...] = ()) -> Pipeline:
    """Attend exactly to a share of the blocks, those of highest score, and to all others by random features, without bias.

    The paper finds what is sparse by hashing; means of blocks stand for that here.

    Paper      Scatterbrain: Unifying Sparse and Low-rank Attention Approximation, Chen et al., arXiv:2110.15343
    """
    always, rest = (Windows(block), Sinks(block)), f"random_features(features={features})"
    return Pipeline((SelectBlocks(always, "pooled", f"top_k(share={share})", block, block, rest=rest, targets=targets, ignore=ignore),))
