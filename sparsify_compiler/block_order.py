"""Order: tokens in another order than they stand in, so that what is read together lies in one block; exact for every mask."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .block_grid import Grid
from .block_layout import ALL, NONE, SOME, BlockTable
from .block_pattern import three


@dataclass(frozen=True)
class Order:
    """Where the token at each place of the new order stood.

    queries   int64 [B or 1, H or 1, Q], a permutation in every row; None leaves the queries as they are
    keys      int64 [B or 1, G or 1, K], the same of keys and values. Keys that do not count must end at the same places for all groups
    """

    queries: Tensor | None = None
    keys: Tensor | None = None

    def take(self, query: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """query [B, H, Q, D], key and value [B, G, K, D] in the new order. Gradients flow through."""
        return taken(query, self.queries), *(taken(other, self.keys) for other in others)

    def give_back(self, rows: Tensor) -> Tensor:
        """What was computed of the queries, [B, H, Q, ...], where these stood."""
        return rows if self.queries is None else taken(rows, self.queries.argsort(-1))

    def give_back_places(self, places: Tensor) -> Tensor:
        """A table of places [B', H', Q, K] where queries and keys stood."""
        if self.keys is not None:
            keys, columns = heads_alike(self.keys, places.transpose(-1, -2))
            places = taken(columns, keys.argsort(-1)).transpose(-1, -2)
        return self.give_back(places)

    def take_mask(self, key_mask: Tensor | None) -> Tensor | None:
        """bool [B, K] of the keys in their new order."""
        if key_mask is None or self.keys is None:
            return key_mask
        return key_mask.gather(1, self.keys[:, 0].expand(len(key_mask), -1))

    def take_bias(self, bias: Tensor | None, heads: int) -> Tensor | None:
        """[B or 1, H or 1, Q, K] of queries and keys in their new order."""
        if bias is None:
            return None
        if self.keys is not None:
            keys = self.keys.repeat_interleave(heads // self.keys.shape[1], 1) if self.keys.shape[1] > 1 else self.keys
            bias = taken(bias.transpose(-1, -2), keys).transpose(-1, -2)
        return taken(bias, self.queries)

    def positions(self, grid: Grid, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A query sees a key where its number is not smaller: ([B, H, NQ, block_q], [B, G, NK, block_k]), all axes or 1.

        Rows beyond the lengths say nothing: queries see as little as the last one of their block, keys are as early as the first.
        """
        q = torch.arange(grid.queries)[None, None] if self.queries is None else self.queries
        q = q + (grid.keys - grid.queries) if grid.causal else torch.full_like(q, grid.keys)
        k = torch.arange(grid.keys)[None, None] if self.keys is None else self.keys
        mask = self.take_mask(key_mask)
        if mask is not None:
            k = torch.where(mask[:, None].to(k.device), k, grid.keys + 1)
        return _blocked(q.to(k.device), grid.block_q), _blocked(k, grid.block_k)

    def seen(self, grid: Grid, key_mask: Tensor | None = None) -> Tensor:
        """int8 [B, H, NQ, NK], all axes or 1: whether NONE, SOME or ALL of the places of a pair of blocks count for dense attention."""
        q, k = self.positions(grid, key_mask)
        q, k = heads_alike(q, k)
        latest, first = q.amax(-1)[..., None], q.amin(-1)[..., None]
        return three(k.amin(-1)[..., None, :] <= latest, k.amax(-1)[..., None, :] <= first)

    def cut(self, table: BlockTable, key_mask: Tensor | None = None) -> BlockTable:
        """The table with tiles for the pairs of blocks of which a query may see some places only."""
        grid = table.grid
        seen = self.seen(grid, key_mask).to(table.kinds.device)
        kinds, seen = heads_alike(table.kinds, seen)
        kinds = torch.where(seen == NONE, NONE, torch.where((kinds == ALL) & (seen == SOME), SOME, kinds)).to(torch.int8)
        where = (kinds == SOME).nonzero(as_tuple=True)
        if not len(where[0]):
            return replace(table, kinds=kinds, tile_of=None, tiles=None)
        q, k = self.positions(grid, key_mask)
        q, k = (_at(t.to(kinds.device), where[0], where[1], kinds.shape[1], block) for t, block in ((q, where[2]), (k, where[3])))
        tiles = q[:, :, None] >= k[:, None]
        if table.tile_of is not None and table.tiles is not None:
            of_pair = heads_alike(table.tile_of.expand_as(table.kinds), kinds)[0].expand_as(kinds)[where]
            tiles = tiles & torch.where((of_pair < 0)[:, None, None], True, table.tiles[of_pair.clamp(min=0)])
        tile_of = torch.full(kinds.shape, -1, dtype=torch.int32, device=kinds.device)
        tile_of[where] = torch.arange(len(tiles), dtype=torch.int32, device=kinds.device)
        return replace(table, kinds=kinds, tile_of=tile_of, tiles=tiles)


def taken(rows: Tensor, order: Tensor | None) -> Tensor:
    """rows [B, H, N] or [B, H, N, D] in an order [B or 1, H or 1, N]."""
    if order is None:
        return rows
    size = (max(len(rows), len(order)), max(rows.shape[1], order.shape[1]))
    order, rows = order.expand(*size, -1), rows.expand(*size, *rows.shape[2:])
    return rows.gather(2, order if rows.dim() == 3 else order[..., None].expand(*order.shape, rows.shape[3]))


def _blocked(places: Tensor, block: int) -> Tensor:
    """[..., N] -> [..., blocks, block]; what is missing repeats the last place."""
    missing = -places.shape[-1] % block
    if missing:
        places = torch.cat((places, places[..., -1:].expand(*places.shape[:-1], missing)), -1)
    return places.reshape(*places.shape[:-1], places.shape[-1] // block, block)


def heads_alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both with as many heads: those of groups are repeated, one for all is left to broadcast. Entries of a batch likewise."""
    heads, batch = max(one.shape[1], other.shape[1]), max(len(one), len(other))
    one, other = (t.repeat_interleave(heads // t.shape[1], 1) if t.shape[1] else t for t in (one, other))
    return one.expand(batch, *one.shape[1:]), other.expand(batch, *other.shape[1:])


def _at(places: Tensor, entry: Tensor, head: Tensor, heads: int, block: Tensor) -> Tensor:
    """[n, block] of [B or 1, H, G or 1, blocks, block]."""
    own = head // (heads // places.shape[1])
    return places[entry if len(places) > 1 else torch.zeros_like(entry), own, block]
