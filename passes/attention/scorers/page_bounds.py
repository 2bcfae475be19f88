"""Page bounds: the most that a query's score can be, by the smallest and largest key of a page (Quest, arXiv:2406.10774, section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.key_sums import of_blocks
from sparsify_compiler.ops.top_pages import Pages
from sparsify_compiler.passes.attention.scorers._blocks import dots, in_blocks, log_visible, means, paged, query_mask, sizes


def page_bounds(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float, *, page: int = 16) -> Tensor:
    """The log of the sum over a block's pages of exp(bound), for the mean of the block of queries.

    page   keys that have bounds of their own; a block is the next multiple (LServe's logical pages, arXiv:2502.14866, section 3.4.2)
    """
    page = math.gcd(max(page, 1), grid.block_k)
    number = sizes(grid.keys, page, key_mask)[:, None, :, None].to(query.device)
    low, high = (of_blocks(key, kind, page, key_mask).masked_fill(number == 0, 0) for kind in ("min", "max"))
    of_query = means(query, grid.block_q, query_mask(grid, key_mask)) * scale
    bound = dots(of_query.clamp(min=0), high) + dots(of_query.clamp(max=0), low) + number.log().squeeze(-1)[:, :, None]
    return torch.logsumexp(in_blocks(bound[..., None], grid.block_k // page, -math.inf).squeeze(-1), -1) + log_visible(grid).to(query.device)


def pages(grid: Grid, *, page: int = 16) -> tuple[Pages, Tensor | None]:
    """A step of decoding by what is kept of the keys alone."""
    return paged("bounds", math.gcd(max(page, 1), grid.block_k), grid)
