"""BlockLayout: which blocks of keys each block of query rows reads, as plain tensors; built from a pattern, or by an indexer from q and k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ops import attend_blocks

Places = Callable[[Tensor, Tensor], Tensor]
NONE, SOME, ALL = 0, 1, 2  # of a pair of blocks: the places that count


@dataclass(frozen=True)
class BlockLayout:
    """The index tensors of attend_blocks, see there: indices and tile_of [B', H', NQ, C], counts [B', H', NQ], tiles [T, block_q, block_k].

    queries, keys  the lengths that it was made for
    """

    indices: Tensor
    counts: Tensor
    tile_of: Tensor | None
    tiles: Tensor | None
    queries: int
    keys: int
    block_q: int
    block_k: int
    causal: bool

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, bias: Tensor | None = None,
               scale: float | None = None) -> tuple[Tensor, Tensor]:
        """Attention over the listed blocks: (out [B, H, Q, E], lse [B, H, Q]). Shapes as in attend_blocks."""
        found: tuple[Tensor, Tensor] = attend_blocks.op(query, key, value, self.indices, self.counts, self.tile_of, self.tiles, key_mask, bias,
                                                        block_q=self.block_q, block_k=self.block_k, causal=self.causal, scale=scale)
        return found

    def density(self) -> float:
        """Listed blocks over the blocks that hold a place that counts for dense attention (below the diagonal where causal)."""
        per_head = self.counts.double().sum() / max(self.counts.shape[0] * self.counts.shape[1], 1)
        return float(per_head) / max(visible_blocks(self.queries, self.keys, self.block_q, self.block_k, self.causal), 1)

    def mask(self) -> Tensor:
        """bool [B', H', Q, K]: every place that counts. For tests and small lengths: it grows with the square of the length."""
        blocks = (0, -(-self.queries // self.block_q))
        return attend_blocks.allowed_places(blocks, self.keys, self.queries, self.indices, self.counts, self.tile_of, self.tiles, None,
                                            block_q=self.block_q, block_k=self.block_k, causal=self.causal)


def visible_blocks(queries: int, keys: int, block_q: int, block_k: int, causal: bool) -> int:
    """Pairs of blocks that hold a place that counts for dense attention."""
    rows, columns = -(-queries // block_q), -(-keys // block_k)
    if not causal:
        return rows * columns
    last = torch.clamp(torch.arange(1, rows + 1) * block_q, max=queries) + (keys - queries)
    return int(torch.clamp(-(-last // block_k), 0, columns).sum())


def from_blocks(chosen: Tensor, queries: int, keys: int, block_q: int, block_k: int, causal: bool) -> BlockLayout:
    """The layout of a table of pairs of blocks: chosen bool [B', H', NQ, NK]. Blocks after the diagonal are dropped where causal."""
    if causal:
        chosen = chosen & visible(queries, keys, block_q, block_k, chosen.device)
    indices, counts = _listed(chosen)
    return BlockLayout(indices, counts, None, None, queries, keys, block_q, block_k, causal)


def from_places(kinds: Tensor, allows: Places, queries: int, keys: int, block_q: int, block_k: int, causal: bool) -> BlockLayout:
    """The layout of a pattern that may cut blocks.

    kinds   int8 [NQ, NK]: NONE, SOME or ALL of the places of a pair of blocks count
    allows  of positions of queries and keys, whether the place counts (bool, broadcast); asked for pairs of blocks that are SOME only

    Equal tiles are kept once. Query rows and keys beyond the lengths are as the pattern says: nobody reads them.
    """
    if causal:
        kinds = torch.where(visible(queries, keys, block_q, block_k, kinds.device), kinds, NONE)
    rows, columns = (kinds == SOME).nonzero(as_tuple=True)
    tile_of = torch.full(kinds.shape, -1, dtype=torch.int32, device=kinds.device)
    tiles = None
    if len(rows):
        q = rows[:, None] * block_q + torch.arange(block_q, device=kinds.device) + (keys - queries)
        k = columns[:, None] * block_k + torch.arange(block_k, device=kinds.device)
        inside = allows(q[:, :, None], k[:, None, :]).expand(len(rows), block_q, block_k)
        counted = inside & (k < keys)[:, None] & (rows[:, None] * block_q + torch.arange(block_q, device=kinds.device) < queries)[:, :, None]
        if causal:
            counted = counted & (k[:, None, :] <= q[:, :, None])
        some = counted.flatten(1).any(1)
        kinds = kinds.clone()
        kinds[rows[~some], columns[~some]] = NONE
        unique, which = torch.unique(inside[some].flatten(1), dim=0, return_inverse=True)
        whole = unique.all(1)
        number = torch.cumsum(~whole, 0, dtype=torch.int32) - 1
        tile_of[rows[some], columns[some]] = torch.where(whole, -1, number)[which].to(torch.int32)
        tiles = unique[~whole].view(-1, block_q, block_k) if not bool(whole.all()) else None
    indices, counts = _listed((kinds != NONE)[None, None])
    kept = None if tiles is None else tile_of[None, None].gather(-1, indices.long())
    return BlockLayout(indices, counts, kept, tiles, queries, keys, block_q, block_k, causal)


def visible(queries: int, keys: int, block_q: int, block_k: int, device: Any = None) -> Tensor:
    """bool [NQ, NK]: pairs of blocks with a place at or below the diagonal, aligned at the end."""
    rows, columns = -(-queries // block_q), -(-keys // block_k)
    last = torch.clamp(torch.arange(1, rows + 1, device=device) * block_q, max=queries) - 1 + (keys - queries)
    return torch.arange(columns, device=device) * block_k <= last[:, None]


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """indices, ascending, and counts, both int32, of a table; at least one place wide."""
    counts = chosen.sum(-1, dtype=torch.int32)
    widest = max(int(counts.max()) if counts.numel() else 0, 1)
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    if order.shape[-1] < widest:
        order = torch.nn.functional.pad(order, (0, widest - order.shape[-1]))
    return order[..., :widest].to(torch.int32).contiguous(), counts


def merge_branches(branches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over disjoint sets of keys as one, exactly: each branch is (out [B, H, Q, E], lse [B, H, Q])."""
    total = torch.logsumexp(torch.stack([lse for _, lse in branches]), 0)
    base = torch.where(total == -torch.inf, 0, total)
    out = sum((part * torch.exp(lse - base)[..., None] for part, lse in branches), start=torch.zeros((), dtype=total.dtype, device=total.device))
    assert isinstance(out, Tensor)
    return out.to(branches[0][0].dtype), total
