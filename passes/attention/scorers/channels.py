"""Channels: scores of every key by a few channels that were found to matter (Double Sparsity, arXiv:2408.07092, section 3.1)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.attention.scorers._blocks import CHUNK, counted, in_blocks, log_visible, means, query_mask


def channels(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float, *, number: int = 16,
             kept: tuple[tuple[int, ...], ...] = ()) -> Tensor:
    """log of the sum over the keys of a block of exp(scale * the kept channels of mean(q) · those of k).

    number   channels of each head, which calibration finds
    kept     those that it found; () keeps all
    """
    of_query, keys = means(query, grid.block_q, query_mask(grid, key_mask)), counted(key, key_mask)
    if kept and len(kept) != query.shape[1]:
        raise StructureError(f"channels of {len(kept)} heads, and the attention has {query.shape[1]}", where="channels", hint="calibrate it again")
    keys = keys.repeat_interleave(query.shape[1] // max(key.shape[1], 1), 1)
    if kept:
        which = torch.tensor(kept, device=query.device)[None, :, None]
        of_query, keys = (t.gather(-1, which.expand(*t.shape[:-1], which.shape[-1])) for t in (of_query, keys))
    found = query.new_full((*query.shape[:2], grid.rows, grid.columns), -math.inf, dtype=torch.float32)
    each = max(1, CHUNK // max(query.shape[0] * query.shape[1] * grid.keys, 1))
    for first in range(0, grid.rows, each):
        last = min(first + each, grid.rows)
        seen = max(min(last * grid.block_q, grid.queries) + grid.keys - grid.queries, 0) if grid.causal else grid.keys
        seen = min(-(-seen // grid.block_k) * grid.block_k, grid.keys)  # whole blocks, of which log_visible() says what share is seen
        scores = of_query[:, :, first:last] @ keys[:, :, :seen].mT * scale
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None, :seen], -math.inf)
        of_blocks = torch.logsumexp(in_blocks(scores[..., None], grid.block_k, -math.inf).squeeze(-1), -1)
        found[:, :, first:last, :of_blocks.shape[-1]] = of_blocks
    return found + log_visible(grid).to(query.device)


def observe(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float) -> Tensor:
    """[H, D]: the sum over all pairs of a query and a key of |q * k|, channel by channel."""
    of_key = counted(key, key_mask).abs().sum(2).repeat_interleave(query.shape[1] // max(key.shape[1], 1), 1)
    return (query.float().abs().sum(2) * of_key).sum(0)


def learn(total: Tensor, *, number: int = 16, kept: tuple[tuple[int, ...], ...] = ()) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The options with the channels of the largest sums, and no tensors."""
    found = total.topk(min(max(number, 1), total.shape[-1]), -1).indices.sort(-1).values
    return {"number": number, "kept": tuple(tuple(row) for row in found.tolist())}, {}
