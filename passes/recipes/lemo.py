"""LeMo."""

from __future__ import annotations

from sparsify_compiler.passes.moe.route_tokens import RouteTokens
from sparsify_compiler.passes.train.add_adapters import AddAdapters
from sparsify_compiler.pipeline import Pipeline


def lemo(density: float | None = None, rank: int = 8, routed: float = 1.0, first: int = 0, keep: str = "") -> Pipeline:
    """For fine-tuning on long texts: each block computes, and keeps for the backward pass, the tokens alone that get most attention there.

    Which they are, a predictor tells from what the block reads, fitted on calibration and trained no more; low-rank adapters train. Here a block
    takes or leaves a token in attention and FFN alike, and has one share of tokens, where the paper has thresholds; it runs no kernel of its own.

    Paper      LeMo: Enabling LEss Token Involvement for MOre Context Fine-tuning, Wang et al., arXiv:2501.09767
    """
    routed_around = RouteTokens(density, routed, "change", "ridge", "one", first, False, keep, "received")
    return Pipeline((routed_around, AddAdapters(f"low_rank(rank={rank})", targets=("re:(?!.*router).*",))))
