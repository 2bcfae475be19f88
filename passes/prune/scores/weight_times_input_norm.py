"""Weight times input norm (Wanda, arXiv:2306.11695, equation 1)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

STATISTICS: tuple[str, ...] = ("input_norm",)


def weight_times_input_norm(weight: Tensor, statistics: Mapping[str, Tensor], seed: int) -> Tensor:
    """|W[n, k]| * ||x[k]||, float32, of the weight's shape [out, in / groups, ...]; input_norm is [in]."""
    norm = statistics["input_norm"].to(weight.device)
    per_group = norm.float().view(-1, weight.shape[1])  # [groups, in / groups]; a linear layer has one group
    per_row = per_group.repeat_interleave(weight.shape[0] // per_group.shape[0], 0) if per_group.shape[0] > 1 else per_group
    return weight.detach().abs().float() * per_row.reshape(*per_row.shape, *(1,) * (weight.dim() - 2))
