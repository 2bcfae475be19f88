"""Summaries: one key and one value for each block, the value an attention inside of the block (Combiner, arXiv:2107.05768, section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.attention.scorers._blocks import counted, dots, in_blocks, query_mask, sizes

ASKERS = ("queries", "keys")


def summaries(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, left: Tensor, grid: Grid, scale: float, *,
              by: str = "queries") -> tuple[Tensor, Tensor]:
    """Attention to the mean keys of the blocks that are left; a block's value is what its mean query finds in it.

    by   "queries" as in the paper, which needs the queries of all blocks: not in decoding; "keys" asks by the block's mean key instead
    """
    dtype, heads = torch.promote_types(query.dtype, torch.float32), query.shape[1] // max(key.shape[1], 1)
    if by not in ASKERS or (by == "queries" and (grid.queries != grid.keys or grid.block_q != grid.block_k)):
        raise StructureError(f"blocks summed up by {by} in attention of {grid.queries} queries to {grid.keys} keys", where="summaries",
                             hint="by is 'queries', for as many queries as keys in equal blocks, or 'keys'")
    counts = key.new_ones(len(key), grid.keys, dtype=torch.bool) if key_mask is None else key_mask
    keys, values = (in_blocks(counted(t, key_mask, dtype), grid.block_k).repeat_interleave(heads, 1) for t in (key, value))
    number = sizes(grid.keys, grid.block_k, counts).to(key.device)[:, None, :, None].to(dtype)
    mean = keys.sum(-2) / number.clamp(min=1)
    asks = mean
    if by == "queries":
        own = query_mask(grid, key_mask)
        asks = in_blocks(counted(query, own, dtype), grid.block_q).sum(-2) / number.clamp(min=1)
    hidden = in_blocks(~counts[:, None, :, None], grid.block_k, True).squeeze(-1)
    shares = torch.softmax((keys @ asks[..., None]).squeeze(-1).mul(scale).masked_fill(hidden, -1e30), -1)
    of_blocks = (shares[..., None, :] @ values).squeeze(-2)
    scores = dots(query.to(dtype) * scale, mean)
    open_ = left.repeat_interleave(grid.block_q, 2)[:, :, :grid.queries] & (number > 0).transpose(-1, -2).squeeze(-2)[:, :, None]
    scores = scores.masked_fill(~open_.repeat_interleave(query.shape[1] // open_.shape[1], 1), -math.inf)
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
    return (torch.exp(scores - torch.where(lse == -math.inf, 0, lse)[..., None]) @ of_blocks).to(query.dtype), lse
