"""Vertical and slash: columns and diagonals that some rows attend to (MInference, arXiv:2407.02490, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.passes.attention.scorers._blocks import CHUNK, counted, in_blocks, row_positions, row_shares


def vertical_slash(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float, *, last: int = 64, step: int = 1,
                   slashes: bool = True) -> Tensor:
    """log(share of the columns of a block + share of the diagonals that cross the pair of blocks), in the mean of the sampled rows.

    A diagonal is the distance of a key from its query. A pair of blocks takes of each as much as it holds of it.

    last      the last rows of the queries that are looked at; 0 is all of them
    step      every how manyth of them
    slashes   False looks at columns only (SampleAttention, arXiv:2406.15486, section 4.2, whose windows near the diagonal are static)
    """
    first = max(grid.queries - last, 0) if last else 0
    rows = torch.arange(grid.queries - 1, first - 1, -max(step, 1))
    keys, (batch, heads) = counted(key, key_mask), query.shape[:2]
    lengths = grid.keys, max(grid.keys + grid.queries - 1, 0)
    columns, distances = (query.new_zeros((batch, heads, length), dtype=torch.float32) for length in lengths)
    each = max(1, CHUNK // max(batch * heads * grid.keys, 1))
    for some in (rows[start:start + each] for start in range(0, len(rows), each)):   # from the last on
        positions = row_positions(grid, some)
        seen = min(max(int(positions[0]) + 1, 0), grid.keys) if grid.causal else grid.keys
        shares = row_shares(query[:, :, some], some, keys[:, :, :seen], key_mask, grid, scale)
        columns[..., :seen] += shares.sum(2)
        if slashes:
            distances.index_add_(-1, _by_distance(positions, seen, grid).to(query.device), shares.flatten(2))
    number = max(len(rows), 1)
    found = in_blocks((columns / number)[..., None], grid.block_k).sum((-2, -1))[:, :, None]
    return (found + _crossing(distances / number, grid)).log() if slashes else found.expand(-1, -1, grid.rows, -1).log()


def _by_distance(positions: Tensor, keys: int, grid: Grid) -> Tensor:
    """int [rows * keys]: how far each of the first keys is from the query at each position, from K - 1 behind it, 0, to Q - 1 after it."""
    return (torch.arange(keys) - positions[:, None] + grid.keys - 1).flatten()


def _crossing(slashes: Tensor, grid: Grid) -> Tensor:
    """[B, H, NQ, NK]: what a row of a pair of blocks has of the diagonals, in the mean of its rows: a difference of sums of sums."""
    twice = pad(pad(slashes.double().cumsum(-1), (1, 0)).cumsum(-1), (1, 0))
    (q0, q1), (k0, k1) = ((a.to(slashes.device) for a in pair) for pair in (grid.q, grid.k))

    def total(edge: Tensor) -> Tensor:  # of the rows q0 ... q1, the diagonals before key `edge`
        return twice[..., edge - q0 + grid.keys] - twice[..., edge - q1 + grid.keys - 1]

    return ((total(k1 + 1) - total(k0)) / (q1 - q0 + 1)).clamp(min=0).to(slashes.dtype)
