"""Gaussian: pooled scores, and what the spread of a block's keys adds to the sum of exponentials. Own: the second cumulant."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.ops.top_pages import Pages
from sparsify_compiler.passes.attention.scorers._blocks import dots, log_keys, means, paged, query_mask


def gaussian(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float) -> Tensor:
    """scale * mean(q) · mean(k) + scale² / 2 * mean(q²) · var(k) + log(keys): exact where channels are independent and normal."""
    of_query = query_mask(grid, key_mask)
    center = means(key, grid.block_k, key_mask)
    spread = (means(key, grid.block_k, key_mask, "squares") - center.square()).clamp(min=0)
    first = dots(means(query, grid.block_q, of_query), center)
    second = dots(means(query, grid.block_q, of_query).square(), spread)
    return first * scale + second * (scale * scale / 2) + log_keys(grid, key_mask).to(query.device)


def pages(grid: Grid) -> tuple[Pages, Tensor | None]:
    """A step of decoding by what is kept of the keys alone."""
    return paged("normal", grid.block_k, grid)
