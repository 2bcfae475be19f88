"""Patterns of whole blocks, at positions that do not move with the length: what a table of blocks says."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.block_pattern import Places, three


class Table(Places):
    """A pattern of `block` × `block` places, numbered from the first key on, so that decoding continues what the prompt began."""

    block: int

    def table(self, rows: Tensor, blocks: int, causal: bool) -> Tensor:
        """bool [len(rows), blocks]: which blocks of keys the blocks of positions `rows` read."""
        raise NotImplementedError

    def allows(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        blocks = max(-(-(grid.keys - grid.shift) // self.block), 1)
        row = torch.clamp(q // self.block, min=0)
        rows, number = torch.unique(row, return_inverse=True)
        return self.table(rows, blocks, grid.causal)[number, torch.clamp(k // self.block, 0, blocks - 1)]

    def kinds(self, grid: Grid) -> Tensor:
        first, last = (torch.clamp(q, min=0).flatten() // self.block for q in grid.q)
        if grid.block_k != self.block or grid.shift or not grid.queries or bool((last - first > 1).any()):
            return super().kinds(grid)
        one, other = (self.table(rows, grid.columns, grid.causal) for rows in (first, last))
        return three(one | other, one & other)
