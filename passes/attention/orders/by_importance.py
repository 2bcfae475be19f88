"""Keys by importance: within segments, those that the last queries attend to come first (PBS-Attn, arXiv:2510.21270, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.block_order import Order
from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.attention.scorers._blocks import counted, row_shares


def by_importance(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float, *, segment: int = 256, last: int = 64) -> Order:
    """Keys of each whole segment by their mean share in the attention of the last queries, the largest first; queries stay.

    What is not a whole segment, at the end, stays too. Keys after a query are in its own segment only: read that one whole, by Windows(size=segment).

    segment   tokens, a multiple of the blocks
    last      queries that say what is important
    """
    if segment < 1 or segment % grid.block_q or segment % grid.block_k:
        raise StructureError(f"segments of {segment} tokens are not made of blocks of {grid.block_q} × {grid.block_k}", where="by_importance",
                             hint="a segment is a multiple of both")
    whole = grid.keys // segment
    rows = torch.arange(max(grid.queries - last, 0), grid.queries)
    if not whole or not len(rows):
        return Order()
    shares = row_shares(query[:, :, rows], rows, counted(key, key_mask), key_mask, grid, scale).mean(2)
    shares = shares.view(len(shares), key.shape[1], -1, grid.keys).mean(2)
    if key_mask is not None:
        shares = shares.masked_fill(~key_mask[:, None], -1)  # behind all others, in every group
    first = torch.arange(0, whole * segment, segment, device=key.device)[:, None]
    inside = shares[..., :whole * segment].reshape(*shares.shape[:2], whole, segment).argsort(dim=-1, descending=True, stable=True) + first
    rest = torch.arange(whole * segment, grid.keys, device=key.device).expand(*shares.shape[:2], -1)
    return Order(keys=torch.cat((inside.flatten(-2), rest), -1))
