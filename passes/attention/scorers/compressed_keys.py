"""Compressed keys: as mean_windows, of windows that a learned map makes one key of (NSA's selection, arXiv:2502.11089, section 3.3.2)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.passes.attention.branches.compressed import compressed
from sparsify_compiler.passes.attention.scorers._windows import block_scores, check_windows, window_mask

LEARNED = ("compress_key", "place_key")


def compressed_keys(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float, compress_key: Tensor, place_key: Tensor, *,
                    length: int = 32, stride: int = 16) -> Tensor:
    """log of the sum of the shares of the windows that overlap a block, one score for all heads of a group. Tensors are those of Compressed."""
    check_windows(length, stride, "compressed_keys")
    of_windows = compressed(key, key_mask, compress_key, place_key, stride)
    return block_scores(query, of_windows, window_mask(key_mask, length, stride), grid, scale, length, stride, largest=False)
