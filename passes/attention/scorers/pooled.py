"""Pooled: the mean of a block of queries times the mean of a block of keys (MInference's block-sparse heads, arXiv:2407.02490, section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.key_sums import of_blocks
from sparsify_compiler.ops.top_pages import Pages
from sparsify_compiler.passes.attention.scorers._blocks import counted, dots, in_blocks, log_keys, means, paged, query_mask, sizes


def pooled(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float, *, similarity: float = -1.0) -> Tensor:
    """scale * mean(q) · mean(k) + log(keys).

    similarity   blocks of queries or keys whose rows have a smaller mean cosine with each other than this say little by their mean: what they read,
                 or who reads them, is read always (SpargeAttn, arXiv:2502.18137, section 3.2). -1 guards none, 1 all
    """
    of_query = query_mask(grid, key_mask)
    number = sizes(grid.keys, grid.block_k, key_mask).to(query.device)[:, None, None].clamp(min=1)
    scores = dots(means(query, grid.block_q, of_query) * scale, of_blocks(key, "sum", grid.block_k, key_mask)) / number
    scores = scores + log_keys(grid, key_mask).to(query.device)
    if similarity > -1:
        rows = _similarity(query, grid.block_q, of_query) < similarity
        columns = (_similarity(key, grid.block_k, key_mask) < similarity).repeat_interleave(query.shape[1] // max(key.shape[1], 1), 1)
        unsure = rows[..., None] | columns[:, :, None]
        scores = torch.where(unsure & (scores > -math.inf), math.inf, scores)
    return scores


def pages(grid: Grid, *, similarity: float = -1.0) -> tuple[Pages, Tensor | None] | None:
    """A step of decoding by what is kept of the keys alone; of similarities nothing is kept."""
    return paged("mean", grid.block_k, grid) if similarity <= -1 else None


def _similarity(rows: Tensor, block: int, mask: Tensor | None) -> Tensor:
    """[B, G, blocks]: mean cosine of all pairs of rows of a block, each row's with itself too; 1 where no row counts."""
    number = sizes(rows.shape[2], block, mask).to(rows.device)[:, None]
    total = in_blocks(normalize(counted(rows, mask), dim=-1), block).sum(-2).square().sum(-1)
    return torch.where(number > 0, total / number.clamp(min=1).square(), 1)
