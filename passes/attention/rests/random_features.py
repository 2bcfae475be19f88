"""Random features: exp(q · k) as a product of features of q and of k, whose sums over blocks are shared (Scatterbrain, arXiv:2110.15343)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.passes.attention.scorers._blocks import counted, in_blocks


def random_features(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, left: Tensor, grid: Grid, scale: float, *,
                    features: int = 128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An estimate of attention to the blocks that are left; of the sums of exp(score) and exp(score) * value, without bias.

    Features are exp(w · x - |x|² / 2) of normal w (Performer's, arXiv:2009.14794, section 2.4).
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    root = math.sqrt(abs(scale))
    w = _normal(query.shape[-1], features, seed).to(query.device, dtype)
    q, k = (_log_features(x.to(dtype) * factor, w) for x, factor in ((query, math.copysign(root, scale)), (key, root)))
    if key_mask is not None:
        k = k.masked_fill(~key_mask[:, None, :, None], -math.inf)
    top_q = q.detach().amax(-1, keepdim=True)
    top_k = k.detach().flatten(2).amax(-1)[..., None, None].clamp(min=-1e30) if k.shape[2] else k.new_zeros(*k.shape[:2], 1, 1)
    q, k = torch.exp(q - top_q), torch.exp(k - top_k)
    heads = query.shape[1] // max(key.shape[1], 1)
    values = torch.cat((counted(value, key_mask, dtype), torch.ones_like(k[..., :1])), -1)
    of_keys, values = (in_blocks(t, grid.block_k).repeat_interleave(heads, 1) for t in (k, values))
    sums = of_keys.transpose(-1, -2) @ values  # [B, H, NK, features, E + 1]
    taken = left.repeat_interleave(query.shape[1] // left.shape[1], 1).to(dtype) @ sums.flatten(-2)
    found = (in_blocks(q, grid.block_q) @ taken.view(*taken.shape[:3], *sums.shape[-2:])).flatten(2, 3)[:, :, :grid.queries]
    some = found[..., -1] > 0
    total = torch.where(some, found[..., -1], 1)
    lse = total.log() + top_q[..., 0] + top_k[..., 0].repeat_interleave(heads, 1)
    return (found[..., :-1] / total[..., None]).to(query.dtype), torch.where(some, lse, -math.inf)


def _log_features(x: Tensor, w: Tensor) -> Tensor:
    """[B, H, N, features]: logs of features whose products sum to exp(x · y) in the mean."""
    return x @ w.T - x.square().sum(-1, keepdim=True) / 2 - math.log(max(len(w), 1)) / 2


@lru_cache(16)
def _normal(width: int, features: int, seed: int) -> Tensor:
    return torch.randn(features, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
