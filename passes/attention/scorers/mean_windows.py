"""Mean windows: attention to the means of overlapping windows of keys, added up over grouped queries (InfLLM-V2, arXiv:2509.24663, section 3.3)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.key_sums import of_blocks
from sparsify_compiler.passes.attention.scorers._blocks import counted
from sparsify_compiler.passes.attention.scorers._windows import block_scores, check_windows, unfolded, window_mask


def mean_windows(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float, *, length: int = 32, stride: int = 16,
                 largest: bool = True) -> Tensor:
    """log of the share of the window that gets most of those that overlap a block, one score for all heads of a group.

    length    keys of a window, every `stride` keys one; only whole ones before a query count
    largest   False takes their sum, as NSA does
    """
    check_windows(length, stride, "mean_windows")
    if length % stride or grid.keys < length:
        of_windows = unfolded(counted(key, key_mask), length, stride).mean(-1)
    else:  # of sums that a cache keeps
        whole = of_blocks(key, "sum", stride, key_mask)[:, :, :grid.keys // stride]
        of_windows = unfolded(whole, length // stride, 1).sum(-1) / length
    return block_scores(query, of_windows, window_mask(key_mask, length, stride), grid, scale, length, stride, largest)
