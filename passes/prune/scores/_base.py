"""What scores share: a vector of the inputs or the outputs of a layer, shaped to multiply its weight."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitudes(weight: Tensor) -> Tensor:
    """|W|, float32 (float64 for float64)."""
    return weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32))


def along_inputs(vector: Tensor, weight: Tensor) -> Tensor:
    """[in] shaped to multiply a weight [out, in / groups, ...]: each output's own group of inputs."""
    per_group = vector.to(weight.device).float().view(-1, weight.shape[1])  # a linear layer has one group
    per_row = per_group.repeat_interleave(weight.shape[0] // per_group.shape[0], 0) if per_group.shape[0] > 1 else per_group
    return per_row.reshape(*per_row.shape, *(1,) * (weight.dim() - 2))


def along_outputs(vector: Tensor, weight: Tensor) -> Tensor:
    """[out], or [out / n] for a layer that computes n such sets of outputs one after the other, shaped to multiply a weight [out, ...]."""
    whole = vector.to(weight.device).float().repeat(weight.shape[0] // max(vector.shape[0], 1))
    return whole.reshape(-1, *(1,) * (weight.dim() - 1))


def share(weight: Tensor, dim: int) -> Tensor:
    """|W| divided by its sum over one dimension (0: each input's, 1: each output's over all that it reads); 0 where that is 0."""
    size = magnitudes(weight)
    total = size.sum(0, keepdim=True) if dim == 0 else size.flatten(1).sum(1).reshape(-1, *(1,) * (weight.dim() - 1))
    return size / total.clamp_min(torch.finfo(total.dtype).tiny)
