"""Dense2MoE."""

from __future__ import annotations

from sparsify_compiler.passes.moe.route_blocks import RouteBlocks
from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.penalise_routing import PenaliseRouting
from sparsify_compiler.pipeline import Pipeline


def dense2moe(experts: int = 16, shared: float = 0.25, density: float | None = None, balance: float = 0.01, depth: float = 1.0,
              group: int = 4) -> Pipeline:
    """For training: the neurons that change the loss most, to first order, are shared, the others dealt out to experts, which are used alike.

    depth: share of the blocks of a group that each text runs through, the paper's mixture of blocks; 1 for all. sc.recover() distils.

    Paper      Dense2MoE: Restructuring Diffusion Transformer to MoE for Efficient Text-to-Image Generation, Zheng et al., arXiv:2510.09094
    """
    split = SplitExperts(experts, "by_importance", "random", "top_k", shared, "taylor", "scaled", "none", density=density)
    blocks = (RouteBlocks(depth, group, "random", weight="softmax"),) if depth < 1 else ()
    return Pipeline((split, *blocks, PenaliseRouting("load_balance", balance)))
