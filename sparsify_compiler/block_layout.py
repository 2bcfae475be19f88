"""BlockLayout: which blocks of keys each block of query rows reads, as plain tensors; built from a pattern, or by an indexer from q and k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .block_grid import Grid
from .ops import attend_blocks

if TYPE_CHECKING:
    from .block_order import Order

Places = Callable[[Tensor, Tensor], Tensor]
NONE, SOME, ALL = 0, 1, 2  # of a pair of blocks: the places that count
NOTHING = -2  # number of a tile without a place
BLOCK = 64  # query rows of a block where all keys are read
CHUNK = 1 << 22  # places that are looked at together


@dataclass(frozen=True)
class BlockLayout:
    """The index tensors of attend_blocks, see there: indices and tile_of [B', H', NQ, C], counts [B', H', NQ], tiles [T, block_q, block_k].

    order   the blocks are of queries and keys in this order; the tiles say what is after the diagonal, and which keys count
    left    bool [B', H', NQ, NK]: blocks wholly before the diagonal that are not listed, where something else stands for them
    """

    indices: Tensor
    counts: Tensor
    tile_of: Tensor | None
    tiles: Tensor | None
    grid: Grid
    order: Order | None = None
    left: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, bias: Tensor | None = None,
               scale: float | None = None, run: Callable[..., Any] | None = None) -> tuple[Tensor, Tensor]:
        """Attention over the listed blocks: (out [B, H, Q, E], lse [B, H, Q]). Shapes as in attend_blocks.

        `run` computes it, by default the op: attend_blocks.reference for what its kernel has to give.
        """
        if self.order is not None:
            query, key, value = self.order.take(query, key, value)
            key_mask, bias = None, self.order.take_bias(bias, query.shape[1])
        run = run or (attend_blocks.computed if attend_blocks.unwatched(query, key, value, bias) else attend_blocks.op)
        found: tuple[Tensor, Tensor] = run(query, key, value, self.indices, self.counts, self.tile_of, self.tiles, key_mask, bias,
                                           block_q=self.grid.block_q, block_k=self.grid.block_k, causal=self._causal, scale=scale)
        return found if self.order is None else (self.order.give_back(found[0]), self.order.give_back(found[1]))

    @property
    def _causal(self) -> bool:
        return self.grid.causal and self.order is None

    def density(self) -> float:
        """Listed blocks over the blocks that hold a place that counts for dense attention (below the diagonal where causal)."""
        per_head = self.counts.double().sum() / max(self.counts.shape[0] * self.counts.shape[1], 1)
        return float(per_head) / max(self.grid.visible_blocks(), 1)

    def mask(self) -> Tensor:
        """bool [B', H', Q, K]: every place that counts. For tests and small lengths: it grows with the square of the length."""
        grid = self.grid
        places = attend_blocks.allowed_places((0, grid.rows), grid.keys, grid.queries, self.indices, self.counts, self.tile_of, self.tiles, None,
                                              block_q=grid.block_q, block_k=grid.block_k, causal=self._causal)
        return places if self.order is None else self.order.give_back_places(places)


@dataclass(frozen=True)
class BlockTable:
    """What of every pair of blocks counts, before it is made into lists.

    kinds    int8 [B', H', NQ, NK]: NONE, SOME or ALL of the places
    tile_of  int32, broadcast to kinds: the tile of a pair that is SOME; tiles bool [T, block_q, block_k]
    """

    kinds: Tensor
    tile_of: Tensor | None
    tiles: Tensor | None
    grid: Grid

    def expand(self, batch: int, heads: int) -> BlockTable:
        """The same for every entry of a batch and every head, where it is the same for all of them now."""
        size = (batch, heads, *self.kinds.shape[2:])
        return replace(self, kinds=self.kinds.expand(size), tile_of=None if self.tile_of is None else self.tile_of.expand(size))

    def take_heads(self, heads: Tensor) -> BlockTable:
        """These heads of a table that has one for each, in this order."""
        return replace(self, kinds=self.kinds[:, heads], tile_of=None if self.tile_of is None else self.tile_of[:, heads])

    def layout(self) -> BlockLayout:
        """The lists of this table."""
        indices, counts = _listed(self.kinds != NONE)
        tile_of = None
        if self.tile_of is not None:
            places = torch.where(self.kinds == SOME, self.tile_of, -1)
            tile_of = places.gather(-1, torch.clamp(indices, max=self.kinds.shape[-1] - 1).long())
        return BlockLayout(indices, counts, tile_of, None if tile_of is None else self.tiles, self.grid)


def stack(tables: list[BlockTable], axis: int = 0) -> BlockTable:
    """Tables of entries of a batch (axis 0) or of heads (axis 1) as one."""
    if len(tables) == 1:
        return tables[0]
    tiles, numbers, known = [], [], 0
    for table in tables:
        of_table = torch.full_like(table.kinds, -1, dtype=torch.int32) if table.tile_of is None else table.tile_of.expand_as(table.kinds)
        numbers.append(torch.where(of_table < 0, -1, of_table + known))
        tiles += [] if table.tiles is None else [table.tiles]
        known += 0 if table.tiles is None else len(table.tiles)
    kinds = torch.cat([table.kinds for table in tables], axis)
    return BlockTable(kinds, torch.cat(numbers, axis) if known else None, torch.cat(tiles) if known else None, tables[0].grid)


def from_blocks(chosen: Tensor, grid: Grid) -> BlockLayout:
    """The layout of a table of pairs of blocks: chosen bool [B', H', NQ, NK]. Blocks after the diagonal are dropped where causal."""
    kinds = torch.where(chosen & grid.visible(chosen.device), ALL, NONE).to(torch.int8)
    return BlockTable(kinds, None, None, grid).layout()


@lru_cache(64)
def every_key(queries: int, keys: int, causal: bool) -> BlockLayout:
    """Dense attention: all keys are one block, so that no list grows with them."""
    grid = Grid(queries, keys, BLOCK, -(-keys // BLOCK) * BLOCK, causal)
    return from_blocks(torch.ones(1, 1, grid.rows, grid.columns, dtype=torch.bool), grid)


def from_places(kinds: Tensor, allows: Places, grid: Grid) -> BlockTable:
    """The table of a pattern that may cut blocks.

    kinds   int8 [NQ, NK]: NONE, SOME or ALL of the places of a pair of blocks count
    allows  of positions of queries and keys, whether the place counts (bool, broadcast); asked for pairs of blocks that are SOME only

    Equal tiles are kept once. Query rows and keys beyond the lengths are as the pattern says: nobody reads them.
    """
    kinds = torch.where(grid.visible(kinds.device), kinds, NONE)
    rows, columns = (kinds == SOME).nonzero(as_tuple=True)
    if not len(rows):
        return BlockTable(kinds[None, None], None, None, grid)
    number = torch.full((len(rows),), NOTHING, dtype=torch.int32, device=kinds.device)
    shapes = _Tiles(grid.block_q, grid.block_k)
    step = max(1, CHUNK // (grid.block_q * grid.block_k))
    for start in range(0, len(rows), step):
        row = rows[start:start + step, None] * grid.block_q + torch.arange(grid.block_q, device=kinds.device)
        k = columns[start:start + step, None] * grid.block_k + torch.arange(grid.block_k, device=kinds.device)
        q = row + (grid.keys - grid.queries)
        inside = allows(q[:, :, None], k[:, None, :]).expand(len(row), grid.block_q, grid.block_k)
        counted = inside & (k < grid.keys)[:, None] & (row < grid.queries)[:, :, None]
        if grid.causal:
            counted = counted & (k[:, None, :] <= q[:, :, None])
        some = counted.flatten(1).any(1)
        number[start:start + step][some] = shapes.number(inside[some])
    tiles = shapes.tensor(kinds.device)
    kinds, tile_of = kinds.clone(), torch.full(kinds.shape, -1, dtype=torch.int32, device=kinds.device)
    kinds[rows, columns] = torch.where(number == NOTHING, NONE, torch.where(number < 0, ALL, SOME)).to(torch.int8)
    tile_of[rows, columns] = torch.clamp(number, min=-1)
    return BlockTable(kinds[None, None], None if tiles is None else tile_of, tiles, grid)


class _Tiles:
    """Different tiles, numbered as they come; one that is True everywhere is -1."""

    def __init__(self, block_q: int, block_k: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._weights = torch.randint(-1 << 62, 1 << 62, (block_q * block_k,), generator=generator)
        self._known: dict[bytes, int] = {b"\1" * (block_q * block_k): -1}
        self._size = (-1, block_q, block_k)

    def number(self, tiles: Tensor) -> Tensor:
        """int32 [n] of bool [n, block_q, block_k]."""
        flat = tiles.flatten(1)
        hashes, which = torch.unique((flat * self._weights.to(flat.device)).sum(1), return_inverse=True)
        first = torch.zeros_like(hashes).scatter_(0, which, torch.arange(len(flat), device=flat.device))
        if not torch.equal(flat[first][which], flat):  # two tiles of one hash
            return torch.tensor([self._of(tile) for tile in flat], dtype=torch.int32, device=flat.device)
        return torch.tensor([self._of(tile) for tile in flat[first]], dtype=torch.int32, device=flat.device)[which]

    def _of(self, tile: Tensor) -> int:
        return self._known.setdefault(tile.cpu().numpy().tobytes(), len(self._known) - 1)

    def tensor(self, device: Any) -> Tensor | None:
        """bool [T, block_q, block_k] of the tiles that were numbered; None without any."""
        numbered = b"".join(list(self._known)[1:])
        return torch.frombuffer(bytearray(numbered), dtype=torch.bool).view(self._size).to(device) if numbered else None


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """indices, ascending, and counts, both int32, of a table; at least one place wide."""
    counts = chosen.sum(-1, dtype=torch.int32)
    widest = max(int(counts.max()) if counts.numel() else 0, 1)
    place = torch.where(chosen, chosen.cumsum(-1) - 1, widest)  # what is not chosen goes to one more column
    number = torch.arange(chosen.shape[-1], dtype=torch.int32, device=chosen.device).expand_as(chosen)
    listed = number.new_zeros(*chosen.shape[:-1], widest + 1).scatter_(-1, place, number)
    return listed[..., :widest].contiguous(), counts


def merge_branches(branches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over disjoint sets of keys as one, exactly: each branch is (out [B, H, Q, E], lse [B, H, Q])."""
    every = torch.stack([lse for _, lse in branches])
    none = (every == -torch.inf).all(0)
    base = torch.logsumexp(torch.where(none, 0, every), 0)  # so that rows without a key have a gradient: none
    total = torch.where(none, -torch.inf, base)
    out = sum((part * torch.exp(lse - base)[..., None] for part, lse in branches), start=torch.zeros((), dtype=total.dtype, device=total.device))
    assert isinstance(out, Tensor)
    return out.to(branches[0][0].dtype), total
