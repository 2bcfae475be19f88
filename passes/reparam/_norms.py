"""BatchNorm with stored statistics as scale and shift, and vectors laid along the dimensions of a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.passes_api import Miss
from sparsify_compiler.rule import Match

NORM = ("mean", "var", "g", "beta", "eps", "training")  # the arguments of norm(), as rules name them


def norm(x: Any, mean: Any, var: Any, g: Any, beta: Any, eps: Any, training: Any) -> Any:
    """batch_norm as a pattern writes it: whether it trains is bound too, so that a rule can say so."""
    return torch.batch_norm(x, g, beta, mean, var, training, 0.0, eps, False)


def batch_statistics(mean: Any, var: Any, training: Any) -> Miss | None:
    """Why a norm is not one scale and one shift a channel: it looks at the batch."""
    if mean is None or var is None:
        return Miss("the norm has no running statistics, so it is always in training mode: it uses those of the batch")
    return Miss("the norm is in training mode: it uses the statistics of the batch") if training else None


def scale_and_shift(mean: Tensor, var: Tensor, g: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The norm as s * x + t for each channel: s and t, both [C]."""
    s = torch.rsqrt(var + eps) if g is None else g * torch.rsqrt(var + eps)
    return s, -mean * s if beta is None else beta - mean * s


def along(vector: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """A vector shaped to multiply `tensor` along one of its dimensions."""
    return vector.reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])


def by_input(vector: Tensor, w: Tensor, groups: int) -> Tensor:
    """A vector [in] shaped to multiply a conv's w [out, in / groups, ...]: for every output, what its own group of inputs has."""
    out, taken = w.shape[0], w.shape[1]
    rows = vector.reshape(groups, 1, taken).expand(groups, out // groups, taken)
    return rows.reshape([out, taken, *[1] * (w.ndim - 2)])


def plus(one: Tensor | None, other: Tensor | None, sign: int = 1) -> Tensor | None:
    """one + sign * other, where a missing bias is 0."""
    if other is None:
        return one
    signed = other if sign == 1 else -other
    return signed if one is None else one + signed


def without_batch(m: Match) -> Miss | None:
    """A conv also takes an input [C, ...] without batch; a norm then takes the dimension after C for its channels."""
    expected, found = m.w.ndim, m.x.ndim
    return None if found == expected else Miss(f"the norm's channels are not the conv's: the input has {found} dimensions, not {expected}")
