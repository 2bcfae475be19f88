"""Proxy heads: groups of heads share the scores of their mean, and each keeps a budget of its own (ProxyAttn, arXiv:2509.24745)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.attention.scorers._blocks import counted, in_blocks, row_shares
from sparsify_compiler.passes.attention.scorers.sampled_rows import sampled_rows


def proxy_heads(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float, *, proxies: int = 1, rows: int = 4) -> Tensor:
    """Scores that are in the order of the proxy's for every head of its group, and as uneven as the head's own in the last block of queries.

    A selector by mass so takes the proxy's blocks, and of them as many as the head itself needs.

    proxies   heads that stand for all, evenly: a divisor of their number
    rows      of each block of queries, as sampled_rows has it
    """
    heads, groups = query.shape[1], key.shape[1]
    if proxies < 1 or heads % proxies:
        raise StructureError(f"{proxies} proxies cannot stand for {heads} heads", where="proxy_heads", hint="the number of heads is their multiple")
    of_query, of_key = (t.reshape(len(t), proxies, heads // proxies, *t.shape[2:]).mean(2) for t in (
        query.float(), counted(key, key_mask).repeat_interleave(heads // max(groups, 1), 1)))
    shared = sampled_rows(of_query, of_key, key_mask, grid, scale, rows=rows).repeat_interleave(heads // proxies, 1)
    if not shared.numel():
        return shared
    taken = torch.arange(grid.queries - ((grid.queries - 1) % grid.block_q + 1), grid.queries)
    own = row_shares(query[:, :, taken], taken, counted(key, key_mask), key_mask, grid, scale).mean(2)
    curve = in_blocks(own[..., None], grid.block_k).sum((-2, -1)).sort(-1, descending=True).values
    return _as_uneven(shared, curve, grid)


def _as_uneven(scores: Tensor, curve: Tensor, grid: Grid) -> Tensor:
    """The logs of a falling curve [B, H, NK], stretched over what is visible, in the order of the scores."""
    seen = torch.isfinite(scores) & grid.visible(scores.device)
    rank = scores.masked_fill(~seen, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    place = (rank * curve.shape[-1]).div(seen.sum(-1, keepdim=True).clamp(min=1), rounding_mode="floor").clamp(max=curve.shape[-1] - 1)
    found = curve[:, :, None].expand(*scores.shape[:3], -1).gather(-1, place).clamp(min=1e-12).log() - 1e-4 * rank
    return torch.where(seen, found, scores)  # what is no number stays none
