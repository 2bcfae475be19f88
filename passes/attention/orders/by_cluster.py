"""Queries and keys by cluster: those that point the same way lie together (Routing Transformer, arXiv:2003.05997, section 4.1)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.block_order import Order
from sparsify_compiler.passes.attention._clusters import LEARNED, learn, nearest, observe

__all__ = ["LEARNED", "by_cluster", "learn", "observe"]


def by_cluster(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float, centroids: Tensor, *, number: int = 16) -> Order:
    """Queries of a head, and keys of a group, by the number of their nearest centroid [G, C, D]; inside of a cluster as they stood.

    number   centroids, which calibration finds
    """
    of_keys = nearest(key, centroids)
    if key_mask is not None:
        of_keys = of_keys.masked_fill(~key_mask[:, None], centroids.shape[1])  # behind all others, in every group
    return Order(nearest(query, centroids).argsort(dim=-1, stable=True), of_keys.argsort(dim=-1, stable=True))
