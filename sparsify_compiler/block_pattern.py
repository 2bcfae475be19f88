"""What a static pattern of attention is: which places count, by the positions of query and key, and what that says of whole blocks."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .block_grid import Grid
from .block_layout import ALL, CHUNK, NONE, SOME, BlockTable, from_places


class Pattern(Protocol):
    """A frozen dataclass, one a file. Each says in its docstring which places count."""

    def allows(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Of positions of queries and keys that broadcast, bool: whether the place counts. What comes after the diagonal is not its business."""

    def kinds(self, grid: Grid) -> Tensor:
        """int8 [NQ, NK]: NONE, SOME or ALL places of a pair of blocks count. SOME may be said of any pair."""


class Places:
    """For patterns that know nothing of blocks: every place is looked at, some rows of blocks at a time."""

    def allows(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        raise NotImplementedError

    def kinds(self, grid: Grid) -> Tensor:
        keys = torch.arange(grid.keys) - grid.shift
        found = torch.zeros(grid.rows, grid.columns, dtype=torch.int8)
        step = max(1, CHUNK // max(grid.block_q * grid.keys, 1))
        for start in range(0, grid.rows, step):
            taken = torch.arange(start * grid.block_q, min((start + step) * grid.block_q, grid.queries))
            places = self.allows((taken + grid.offset)[:, None], keys, grid).expand(len(taken), grid.keys)
            found[start:start + step] = _kinds(places, grid, min(step, grid.rows - start))
        return found


def _kinds(places: Tensor, grid: Grid, rows: int) -> Tensor:
    """NONE, SOME or ALL of each pair of blocks of a table of places: of so many rows of blocks, and all columns."""
    height = len(places) if rows == 1 else grid.block_q  # one row of decoding is no block of rows
    missing = (0, grid.columns * grid.block_k - places.shape[1], 0, rows * height - places.shape[0])
    counted, possible = (torch.nn.functional.pad(t.to(torch.float32), missing).view(rows, height, grid.columns, grid.block_k).sum((1, 3))
                         for t in (places, torch.ones_like(places)))
    return torch.where(counted == 0, NONE, torch.where(counted == possible, ALL, SOME)).to(torch.int8)


def three(some: Tensor, every: Tensor) -> Tensor:
    """int8: ALL where every place counts, else SOME where some may."""
    return torch.where(every, ALL, torch.where(some, SOME, NONE)).to(torch.int8)


def union(patterns: tuple[Pattern, ...], grid: Grid) -> BlockTable:
    """The table of the union of patterns; of no pattern, nothing counts."""
    kinds = torch.full((grid.rows, grid.columns), NONE, dtype=torch.int8)
    for pattern in patterns:
        kinds = torch.maximum(kinds, pattern.kinds(grid))

    def allows(q: Tensor, k: Tensor) -> Tensor:
        found = torch.zeros((), dtype=torch.bool)
        for pattern in patterns:
            found = found | pattern.allows(q - grid.shift, k - grid.shift, grid)
        return found

    return from_places(kinds, allows, grid)
