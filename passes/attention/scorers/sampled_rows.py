"""Sampled rows: the exact attention of a few rows of every block of queries (SampleAttention's first stage, arXiv:2406.15486, block by block)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.passes.attention.scorers._blocks import CHUNK, counted, in_blocks, log_mean, row_shares


def sampled_rows(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float, *, rows: int = 4) -> Tensor:
    """log of the mean share that evenly spaced rows of a block of queries, the last one among them, give to a block of keys.

    rows   of each block of queries; 0 is all of them, which is what a perfect scorer would say
    """
    keys = counted(key, key_mask)
    step = max(grid.block_q // rows, 1) if rows else 1
    found = query.new_full((*query.shape[:2], grid.rows, grid.columns), -torch.inf, dtype=torch.float32)
    each = max(1, CHUNK // max(query.shape[0] * query.shape[1] * (grid.block_q // step) * grid.keys, 1))
    for first in range(0, grid.rows, each):
        last = min(first + each, grid.rows)
        taken, which = _rows(grid, first, last, step)
        seen = max(min(last * grid.block_q, grid.queries) + grid.keys - grid.queries, 0) if grid.causal else grid.keys
        shares = row_shares(query[:, :, taken], taken, keys[:, :, :seen], key_mask, grid, scale)
        of_blocks = in_blocks(shares[..., None], grid.block_k).sum((-2, -1))
        found[:, :, first:last, :of_blocks.shape[-1]] = log_mean(of_blocks, which.to(query.device), last - first)
    return found


def _rows(grid: Grid, first: int, last: int, step: int) -> tuple[Tensor, Tensor]:
    """Numbers of the sampled rows of the blocks first ... last, and the block, from first on, that each is of."""
    ends = torch.clamp(torch.arange(first + 1, last + 1) * grid.block_q, max=grid.queries) - 1
    rows = ends[:, None] - torch.arange(0, grid.block_q, step)
    inside = rows >= torch.arange(first, last)[:, None] * grid.block_q
    return rows[inside], torch.arange(last - first)[:, None].expand_as(rows)[inside]
