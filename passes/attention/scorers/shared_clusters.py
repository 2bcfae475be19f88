"""Shared clusters: how many of the pairs of a query and a key have the same nearest centroid (Routing Transformer, arXiv:2003.05997, section 4.1)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import one_hot

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.passes.attention._clusters import LEARNED, learn, nearest, observe
from sparsify_compiler.passes.attention.scorers._blocks import dots, in_blocks

__all__ = ["LEARNED", "learn", "observe", "shared_clusters"]


def shared_clusters(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float, centroids: Tensor, *, number: int = 16) -> Tensor:
    """log of the number of pairs of a query and a key of one cluster; -inf, which no selector takes, where there is none.

    number   centroids [G, C, D], which calibration finds
    """
    of_query, of_key = (one_hot(nearest(rows, centroids), centroids.shape[1]).float() for rows in (query, key))
    if key_mask is not None:
        of_key = of_key.masked_fill(~key_mask[:, None, :, None], 0)
    return dots(in_blocks(of_query, grid.block_q).sum(-2), in_blocks(of_key, grid.block_k).sum(-2)).log()
