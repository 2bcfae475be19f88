"""A step of decoding whose blocks are chosen by what is kept of their pages: one op (ops/top_pages.py) stands for scorer, selector and lists.

A scorer that can be had so has a function `pages` in its file: (grid, **options) -> (Pages, None or float32 [NK], the log of the share of a block's
places that lie below the diagonal), or None. A selector has `numbers`: (**options) -> (the share of a row's blocks, as many at least).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .block_grid import Grid
from .block_layout import BlockLayout, stack
from .block_tables import LAYOUTS, PARSED, named, starts, static_table
from .key_sums import kept_blocks
from .ops import attend_blocks, top_pages

if TYPE_CHECKING:
    from .indexer import Indexer

ROWS = 8  # query rows up to which a call is a step of decoding


def layout(indexer: Indexer, query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float) -> BlockLayout | None:
    """What the indexer reads, of queries [B, H, Q, D] and keys [B, G, K, D] without a gradient; None where its files have to say it themselves."""
    if grid.rows != 1 or grid.queries > ROWS or not numbers_of(indexer, query.shape[1]):
        return None
    found = _pages(indexer, query.shape[1], grid)
    if found is None or not attend_blocks.unwatched(query, key) or not top_pages.has_kernel(query, key):
        return None
    pages, open_share = found
    heads, tiles = _heads(indexer, query.shape[1], grid, starts(key_mask))
    kept = tuple(kept_blocks(key, kind, pages.page, key_mask) for kind in top_pages.KINDS[pages.way])
    knows = key_mask is not None and grid.queries <= grid.keys and (grid.causal or grid.queries == grid.keys)
    own = key_mask[:, grid.keys - grid.queries:] if knows and key_mask is not None else None
    indices, counts, tile_of = top_pages.computed(query, key, kept, key_mask, own, open_share, heads, pages=pages, block=grid.block_k, scale=scale)
    return BlockLayout(indices, counts, tile_of, None if tile_of is None else tiles, grid)


@lru_cache(PARSED)
def numbers_of(indexer: Indexer, total: int) -> tuple[tuple[float, int], ...]:
    """Of each head, the share of its blocks and as many at least, (0, -1) where it reads a pattern alone; () where they cannot be had so."""
    if indexer.order or indexer.rest or len({part.scorer for part, _ in indexer.parts(total)} - {""}) != 1:
        return ()
    every: list[tuple[float, int]] = [(0.0, -1)] * total
    for part, heads in indexer.parts(total):
        if part.scorer:
            selector = named("block selector", part.selector)
            if not hasattr(selector.module, "numbers"):
                return ()
            for head in heads or range(total):
                every[head] = selector.module.numbers(**selector.options)
    return tuple(every)


@lru_cache(LAYOUTS)
def _pages(indexer: Indexer, total: int, grid: Grid) -> tuple[top_pages.Pages, Tensor | None] | None:
    scorer = named("block scorer", next(part.scorer for part, _ in indexer.parts(total) if part.scorer))
    if not hasattr(scorer.module, "pages"):
        return None
    found: tuple[top_pages.Pages, Tensor | None] | None = scorer.module.pages(grid, **scorer.options)
    return found


@lru_cache(LAYOUTS)
def _heads(indexer: Indexer, total: int, grid: Grid, shifts: tuple[int, ...]) -> tuple[top_pages.Heads, Tensor | None]:
    """What each head reads of blocks, and the tiles of those that a pattern cuts."""
    parts = indexer.parts(total)
    table = static_table(parts[0][0].always, grid, shifts)
    if len(parts) > 1:
        tables = [static_table(part.always, grid, shifts).expand(len(shifts), len(heads)) for part, heads in parts]
        table = stack(tables, 1).take_heads(torch.tensor([head for _, heads in parts for head in heads]).argsort())
    shares, least = (torch.tensor(column, dtype=dtype) for column, dtype in
                     zip(zip(*numbers_of(indexer, total), strict=True), (torch.float32, torch.int32), strict=True))
    numbers = None if table.tile_of is None else table.tile_of.expand_as(table.kinds)[:, :, 0].to(torch.int32).contiguous()
    return top_pages.Heads(shares, least, table.kinds[:, :, 0].to(torch.int8).contiguous(), numbers), table.tiles
