"""Attention rank: blocks whose attention maps have a low rank hardly tell tokens apart (the ARank of gamma-MoD, arXiv:2410.13859)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify_compiler.ops import attend
from sparsify_compiler.passes.attention._calibration import observed
from sparsify_compiler.passes.moe._depth import Depth
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program
from sparsify_compiler.sites import find_sites

LOWEST = -1e9


def attention_rank(program: Program, blocks: Sequence[Depth], ctx: Context) -> Tensor:
    """The rank of a head's attention map over the number of its tokens, averaged over heads and texts; infinite for a block without attention.

    As in the authors' code, the diagonal of a causal map counts as zeros: with it every such map has full rank.
    """
    sites = find_sites(program, ("attention",))
    own = [[site for site in sites if site.region == one.region.path and site.roles["attention"] in {node.name for node in one.part.inside}]
           for one in blocks]
    watched = [site for group in own for site in group]
    sums = observed(program, watched, ctx, _ranks, "attention_rank") if watched else {}
    found = [sum((sums[site.path] for site in group), torch.zeros(2, dtype=torch.float64)) for group in own]
    return torch.tensor([float(total / count) if count else float("inf") for total, count in found], dtype=torch.float32)


def _ranks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, out: Tensor) -> Tensor:
    """float64 [2]: the sum of rank / tokens over texts and heads, and their number."""
    key_mask, bias, triangle = attend.split_mask(mask, query, key)
    scores = query.float() @ key.float().repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale
    if bias is not None:
        scores = scores + bias.float()
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], LOWEST)
    if causal or triangle:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), LOWEST)
    maps = scores.softmax(-1)
    if causal or triangle:
        maps = maps.masked_fill(torch.eye(maps.shape[-2], maps.shape[-1], dtype=torch.bool), 0)
    ranks = torch.linalg.matrix_rank(maps).double() / min(maps.shape[-2:])
    return torch.stack([ranks.sum(), torch.tensor(ranks.numel(), dtype=torch.float64)])
