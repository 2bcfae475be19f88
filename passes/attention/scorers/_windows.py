"""Overlapping windows of keys, one key for each: attention to them, and what that says of blocks (NSA, arXiv:2502.11089, section 3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.attention.scorers._blocks import CHUNK, dots, in_blocks, row_positions


def check_windows(length: int, stride: int, where: str) -> None:
    """Raises StructureError."""
    if not 1 <= stride <= length:
        raise StructureError(f"windows of {length} keys every {stride}", where=where, hint="a window is at least as long as the step to the next")


def windows(keys: int, length: int, stride: int) -> int:
    """How many whole windows there are."""
    return max((keys - length) // stride + 1, 0)


def unfolded(rows: Tensor, length: int, stride: int) -> Tensor:
    """[B, G, K, ...] -> [B, G, windows, ..., length]."""
    if rows.shape[2] < length:
        return rows.new_zeros(*rows.shape[:2], 0, *rows.shape[3:], length)
    return rows.unfold(2, length, stride)


def window_mask(key_mask: Tensor | None, length: int, stride: int) -> Tensor | None:
    """bool [B, windows]: those whose keys all count."""
    return None if key_mask is None else unfolded(key_mask[:, None], length, stride)[:, 0].all(-1)


def block_scores(query: Tensor, of_windows: Tensor, mask: Tensor | None, grid: Grid, scale: float, length: int, stride: int, largest: bool) -> Tensor:
    """float32 [B, G, NQ, NK]: log of what the heads of a group give to the windows that overlap a block, by softmax over all windows before a query.

    of_windows [B, G, windows, D]; mask [B, windows]; largest: of these windows the one that gets most, or their sum, each as often as the steps that
    it shares with the block.
    """
    number, groups = of_windows.shape[2], max(of_windows.shape[1], 1)
    start, block = torch.arange(number)[:, None] * stride, torch.arange(grid.columns) * grid.block_k
    shared = (torch.minimum(start + length, block + grid.block_k) - torch.maximum(start, block)).clamp(min=0).float().to(query.device) / stride
    found = query.new_full((len(query), groups, grid.rows, grid.columns), math.log(1e-30), dtype=torch.float32)
    each = max(1, CHUNK // max(query.shape[0] * query.shape[1] * grid.block_q * (grid.columns if largest else 1) * max(number, 1), 1))
    for first in range(0, grid.rows if number else 0, each):
        rows = torch.arange(first * grid.block_q, min((first + each) * grid.block_q, grid.queries))
        hidden = (start[:, 0] + length - 1 > row_positions(grid, rows)[:, None]).to(query.device) if grid.causal else shared.new_zeros(1, 1).bool()
        hidden = hidden if mask is None else hidden | ~mask[:, None, None]
        scores = dots(query[:, :, rows].float() * scale, of_windows.float()).masked_fill(hidden, -math.inf)
        shares = torch.softmax(scores, -1).nan_to_num(0).view(len(query), groups, -1, len(rows), number).sum(2)
        shares = in_blocks(shares, grid.block_q).sum(-2)
        of_blocks = (shares[..., None] * (shared > 0)).amax(-2) if largest else shares @ shared
        found[:, :, first:first + each] = of_blocks.clamp(min=1e-30).log()  # a block that nothing is known of is the last choice, but one
    return found
