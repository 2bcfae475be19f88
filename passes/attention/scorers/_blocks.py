"""What scorers share.

A scorer is a function `name(query, key, key_mask, grid, scale, *, options) -> scores` in a file of its own: query [B, H, Q, D], key [B, G, K, D],
key_mask bool [B, K] or None (keys that count; what the others hold is never looked at), scores float32 [B, H, NQ, NK]. A score estimates the log of
the sum of exp(score) over a pair of blocks, up to a number of its own for each head and row of blocks; +inf where the pair must be read. Of blocks
of keys that do not count, and after the diagonal, a score may be anything: the indexer drops them. A NaN among what counts makes scores NaN, which
are read.

Where keys are summed up by blocks first (means, bounds), engine's key_sums keeps that while a cache grows: a step of decoding then costs no look at
every key.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.key_sums import of_blocks
from sparsify_compiler.ops.top_pages import Pages

GRIDS = 16  # lengths that are remembered: all layers of a model share them
CHUNK = 1 << 20  # scores that are held at once: they stay in a cache


def in_blocks(rows: Tensor, block: int, fill: float = 0.0) -> Tensor:
    """[..., N, D] -> [..., ceil(N / block), block, D]; what is missing of the last block is `fill`."""
    count = -(-rows.shape[-2] // block)
    return pad(rows, (0, 0, 0, count * block - rows.shape[-2]), value=fill).reshape(*rows.shape[:-2], count, block, rows.shape[-1])


def counted(rows: Tensor, mask: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, G, N, D] of a dtype, with 0 in the rows that do not count."""
    return rows.to(dtype) if mask is None else rows.to(dtype).masked_fill(~mask[:, None, :, None], 0)


def sizes(length: int, block: int, mask: Tensor | None) -> Tensor:
    """float32 [B or 1, N]: how many rows of each block count."""
    return _whole_sizes(length, block) if mask is None else in_blocks(mask.float()[..., None], block).sum((-2, -1))


@lru_cache(GRIDS)
def _whole_sizes(length: int, block: int) -> Tensor:
    return (length - torch.arange(0, length, block, dtype=torch.float32)).clamp(max=block)[None]


def means(rows: Tensor, block: int, mask: Tensor | None, kind: str = "sum") -> Tensor:
    """float32 [B, G, blocks, D]: the mean of the rows that count, or of their "squares"; 0 where none does."""
    number = sizes(rows.shape[2], block, mask).to(rows.device)
    return of_blocks(rows, kind, block, mask) / number[:, None, :, None].clamp(min=1)


def query_mask(grid: Grid, key_mask: Tensor | None) -> Tensor | None:
    """bool [B, Q]: the queries that are tokens which count, where queries are the last of the keys; None where all count or nobody knows."""
    if key_mask is None or grid.queries > grid.keys or not (grid.causal or grid.queries == grid.keys):
        return None
    return key_mask[:, grid.keys - grid.queries:]


def dots(query: Tensor, key: Tensor) -> Tensor:
    """query [B, H, N, D] · key [B, G, M, D] -> [B, H, N, M], grouped queries."""
    batch, heads, rows, width = query.shape
    groups = max(key.shape[1], 1)
    together = query.reshape(batch, groups, heads // groups * rows, width)
    return (together @ key.transpose(-1, -2)).view(batch, heads, rows, key.shape[2])


def log_keys(grid: Grid, key_mask: Tensor | None) -> Tensor:
    """float32 [B or 1, 1, NQ, NK]: log of the number of keys of a block that a row of a block of queries sees, in the mean of its rows."""
    return sizes(grid.keys, grid.block_k, key_mask)[:, None, None].log() + log_visible(grid).to("cpu" if key_mask is None else key_mask.device)


@lru_cache(GRIDS)
def log_visible(grid: Grid) -> Tensor:
    """float32 [NQ, NK]: log of the share of a pair's places that lie at or below the diagonal; 0 where all count."""
    return _visible_share(grid).log() if grid.causal else torch.zeros(grid.rows, grid.columns, dtype=torch.float32)


def paged(way: str, page: int, grid: Grid) -> tuple[Pages, Tensor | None]:
    """What one row of blocks of queries needs to be scored by pages alone (engine's page_choice)."""
    return Pages(way, page), log_visible(grid)[0].contiguous() if grid.causal and grid.queries > 1 else None


def _visible_share(grid: Grid) -> Tensor:
    """float32 [NQ, NK]: of the places of a pair of blocks, those at or below the diagonal."""
    first, last = (position.float() for position in grid.q)
    start, stop = (position.float() for position in grid.k)
    width = stop - start + 1

    def below(position: Tensor) -> Tensor:  # places at or below the diagonal of all rows up to this position
        depth = (position - start + 1).clamp(min=0)
        inside = depth.minimum(width)
        return inside * (inside + 1) / 2 + (depth - inside) * width

    return (below(last) - below(first - 1)) / ((last - first + 1) * width)


def row_positions(grid: Grid, rows: Tensor) -> Tensor:
    """The key that each of these rows of the queries stands at."""
    return rows + (grid.keys - grid.queries)


def row_shares(query: Tensor, rows: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float) -> Tensor:
    """Exact shares of attention of some rows of the queries: query [B, H, R, D], rows int [R] their numbers -> [B, H, R, K].

    0 for rows that see nothing. key is what counted() gives, or as much of its beginning as the rows see.
    """
    scores, keys = dots(query.float() * scale, key), key.shape[2]
    hidden = None if key_mask is None else ~key_mask[:, None, None, :keys]
    if grid.causal:
        after = torch.arange(keys, device=key.device) > row_positions(grid, rows.to(key.device))[:, None]
        hidden = after if hidden is None else hidden | after
    if hidden is None:
        return torch.softmax(scores, -1)
    shares = torch.softmax(scores.masked_fill_(hidden, -math.inf), -1)
    blind = hidden.all(-1, keepdim=True)
    return shares.masked_fill_(blind, 0) if bool(blind.any()) else shares


def log_mean(shares: Tensor, which: Tensor, blocks: int) -> Tensor:
    """log of the mean over the rows of each block of queries: shares [B, H, R, NK], which int [R] the block of each -> [B, H, blocks, NK]."""
    total = shares.new_zeros(*shares.shape[:2], blocks, shares.shape[-1]).index_add_(2, which, shares)
    return (total / torch.bincount(which, minlength=blocks).clamp(min=1)[:, None]).log()
