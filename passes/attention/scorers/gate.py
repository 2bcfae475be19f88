"""Gate: pooled queries and keys through a linear layer each, trained to say what attention's largest shares are (SeerAttention, arXiv:2410.13276)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.key_sums import of_blocks
from sparsify_compiler.passes.attention.scorers._blocks import CHUNK, counted, dots, in_blocks, means, query_mask, row_shares
from sparsify_compiler.passes.attention.scorers._distil import Sample, distilled

LEARNED = ("gate_query", "gate_key")


def gate(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float, gate_query: Tensor, gate_key: Tensor, *,
         epochs: int = 60) -> Tensor:
    """scale * (mean(q) gate_query) · ((max(k), min(k), mean(k)) gate_key): gate_query [H, D, D], gate_key [G, 3 D, D].

    The paper pools before rotary positions and turns what it pooled by blocks; here attention is seen after them.

    epochs   of the training by calibration batches
    """
    return scored(*_pooled(query, key, key_mask, grid, scale), gate_query, gate_key)


def scored(of_query: Tensor, of_key: Tensor, gate_query: Tensor, gate_key: Tensor) -> Tensor:
    """[B, H, NQ, NK] of what was pooled: queries [B, H, NQ, D], keys [B, G, NK, 3 D]."""
    return dots(of_query @ gate_query.float(), of_key @ gate_key.float())


def _pooled(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float) -> tuple[Tensor, Tensor]:
    ends = [of_blocks(key, kind, grid.block_k, key_mask) for kind in ("max", "min")]
    of_key = torch.cat([torch.where(end.isinf(), 0, end) for end in ends] + [means(key, grid.block_k, key_mask)], -1)
    return means(query, grid.block_q, query_mask(grid, key_mask)) * scale, of_key


def observe(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float) -> tuple[Sample, ...]:
    """What is pooled, and the largest share of attention in every pair of blocks, of rows that sum to 1 (section 3.2)."""
    keys, largest = counted(key, key_mask), query.new_zeros((*query.shape[:2], grid.rows, grid.columns), dtype=torch.float32)
    each = max(1, CHUNK // max(query.shape[0] * query.shape[1] * grid.block_q * grid.keys, 1))
    for first in range(0, grid.rows, each):
        taken = torch.arange(first * grid.block_q, min((first + each) * grid.block_q, grid.queries))
        shares = row_shares(query[:, :, taken], taken, keys, key_mask, grid, scale)
        of_blocks_ = in_blocks(shares.transpose(-1, -2), grid.block_k).amax(-2).transpose(-1, -2)
        largest[:, :, first:first + each] = in_blocks(of_blocks_, grid.block_q).amax(-2)
    wanted = largest / largest.sum(-1, keepdim=True).clamp(min=1e-30)
    return (Sample(*_pooled(query, key, key_mask, grid, scale), wanted, grid.visible()),)


def learn(samples: tuple[Sample, ...], *, epochs: int = 60) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The tensors of LEARNED, trained from what the means alone say."""
    heads, width = samples[0].query.shape[1], samples[0].query.shape[-1]
    groups = samples[0].key.shape[1]
    whole = torch.eye(width, dtype=torch.float32)
    first = torch.cat((torch.zeros(2 * width, width, dtype=torch.float32), whole))
    start = (whole.repeat(heads, 1, 1), first.repeat(groups, 1, 1))
    return {"epochs": epochs}, dict(zip(LEARNED, distilled(scored, samples, start, epochs), strict=True))
