"""Antidiagonal: the scores along the antidiagonals of small tiles, which every row and column of a block crosses (XAttention, arXiv:2503.16428)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.passes.attention.scorers._blocks import CHUNK, counted, dots, in_blocks, query_mask, sizes


def antidiagonal(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float, *, stride: int = 8) -> Tensor:
    """log of the mean share of the pair in a softmax over tiles of stride × stride places, each the mean of the scores on its antidiagonal.

    stride   cut to a common divisor with the blocks
    """
    stride = math.gcd(max(stride, 1), grid.block_q, grid.block_k)
    rows, columns = grid.block_q // stride, grid.block_k // stride
    q, k = (in_blocks(in_blocks(counted(t, mask), block), stride) for t, mask, block in (
        (query, query_mask(grid, key_mask), grid.block_q), (key, key_mask, grid.block_k)))  # [B, H, blocks, tiles, stride, D]
    q, k = q.flip(-2).flatten(-2), k.flatten(-2).flatten(2, 3)
    empty = in_blocks(sizes(grid.keys, stride, key_mask)[..., None], columns).flatten(1) == 0
    row = torch.arange(q.shape[2] * rows) * stride
    hidden = empty[:, None, None].to(query.device)
    found = query.new_full((*query.shape[:2], q.shape[2], k.shape[2] // columns), -math.inf, dtype=torch.float32)
    each = max(1, CHUNK // max(query.shape[0] * query.shape[1] * rows * k.shape[2], 1))
    for first in range(0, q.shape[2], each):
        part, of_rows = q[:, :, first:first + each].flatten(2, 3), row[first * rows:(first + each) * rows]
        after, seen = hidden, k.shape[2]
        if grid.causal:
            end = (of_rows + stride).clamp(max=grid.queries) + (grid.keys - grid.queries)
            seen = min(max(-(-int(end.max()) // grid.block_k) * columns, 0), k.shape[2])
            after = hidden | (torch.arange(k.shape[2]) * stride >= end[:, None]).to(query.device)
        after = (after | (of_rows >= grid.queries).to(query.device)[:, None])[..., :seen]
        scores = dots(part * (scale / stride), k[:, :, :seen]).masked_fill_(after, -math.inf)
        shares = torch.softmax(scores, -1).masked_fill_(after, 0)
        found[:, :, first:first + each, :seen // columns] = in_blocks(in_blocks(shares[..., None], columns).sum((-2, -1)), rows).mean(3).log()
    return found
