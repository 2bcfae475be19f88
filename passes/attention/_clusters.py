"""Clusters of queries and keys by centroids that calibration finds: k-means on the sphere (Routing Transformer, arXiv:2003.05997, section 4.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.passes.attention.scorers._blocks import counted

LEARNED = ("centroids",)
SAMPLED, ROUNDS = 8, 12  # every how many-th token learns; how often centroids become the means of what is nearest to them


def nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    """int64 [B, H, N]: for rows [B, H, N, D] the centroid [G, C, D] of their group that they point to most."""
    each = centroids.to(rows.device, torch.float32).repeat_interleave(rows.shape[1] // len(centroids), 0)
    return (rows.float() @ each.transpose(-1, -2)).argmax(-1)


def observe(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float) -> tuple[Tensor, ...]:
    """Some queries and keys of each group, as directions: float32 [G, n, D]."""
    groups = max(key.shape[1], 1)
    return (torch.cat([directions(part[:, :, ::SAMPLED], groups) for part in (query, counted(key, key_mask))], 1),)


def learned(samples: tuple[Tensor, ...], number: int) -> dict[str, Tensor]:
    """The tensors of LEARNED: centroids [G, C, D] of length 1, each the mean direction of what is nearest to it."""
    rows = torch.cat(samples, 1)
    centroids = _spread(rows, number)
    for _ in range(ROUNDS):
        centroids = moved(rows, centroids, 0.0)
    return dict(zip(LEARNED, (centroids,), strict=True))


def moved(rows: Tensor, centroids: Tensor, decay: float) -> Tensor:
    """Centroids [G, C, D] a step nearer to the mean directions of the rows [G, n, D], of length 1, that are nearest to each; an empty one stays."""
    which = nearest(rows[None], centroids)[0]
    means = normalize(torch.zeros_like(rows[:, :1]).repeat(1, centroids.shape[1], 1).scatter_add_(1, which[..., None].expand_as(rows), rows), dim=-1)
    return torch.where(means.any(-1, keepdim=True), normalize(decay * centroids.float() + (1 - decay) * means, dim=-1), centroids.float())


def directions(rows: Tensor, groups: int) -> Tensor:
    """float32 [G, n, D], of length 1, of rows [B, G or H, N, D]."""
    return normalize(rows.float().reshape(len(rows), groups, -1, rows.shape[-1]).transpose(0, 1).reshape(groups, -1, rows.shape[-1]), dim=-1)


def _spread(rows: Tensor, number: int) -> Tensor:
    """Some of the rows [G, n, D] to begin with, drawn the more probably the further they are from those drawn before (k-means++)."""
    generator = torch.Generator().manual_seed(0)
    drawn = [rows[:, :1]]
    for _ in range(number - 1):
        apart = (1 - (rows @ torch.cat(drawn, 1).transpose(-1, -2)).amax(-1)).clamp(min=1e-6)
        which = torch.multinomial(apart.cpu(), 1, generator=generator).to(rows.device)
        drawn.append(rows.gather(1, which[..., None].expand(-1, -1, rows.shape[-1])))
    return torch.cat(drawn, 1)


def learn(samples: tuple[Tensor, ...], *, number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What observe() saw as options and tensors."""
    return {"number": number}, learned(samples, number)
