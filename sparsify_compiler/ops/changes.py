"""changes: by how much values, rounded, differ from those of the time step before. What stays the same is an exact zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._linear import LIBRARY


def reference(x: Tensor, step: float) -> Tensor:
    """x [batch, time, inputs], any float dtype -> the same shape: q[:, 0], then q[:, t] - q[:, t - 1]; q is x in multiples of step, x itself for 0.

    The gradient of x is that of q: it passes the rounding straight through.
    """
    rounded = (x / step).round() * step if step else x
    return torch.cat((rounded[:, :1], rounded[:, 1:] - rounded[:, :-1]), 1)


def _check(x: Tensor, step: float) -> None:
    torch._check(x.dim() == 3 and step >= 0,
                 lambda: f"changes: x has shape {tuple(x.shape)} and step is {step}, needs [batch, time, inputs] and 0 or more")  # type: ignore[no-untyped-call]


def _everywhere(x: Tensor, step: float) -> Tensor:
    _check(x, step)
    return reference(x, step)


def _fake(x: Tensor, step: float) -> Tensor:
    _check(x, step)
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Nothing is needed for the way back."""


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.cat((grad[:, :-1] - grad[:, 1:], grad[:, -1:]), 1), None


LIBRARY.define("changes(Tensor x, float step) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("changes", _everywhere, "CompositeExplicitAutograd")
torch.library.register_fake("sparsify::changes", _fake, lib=LIBRARY)
torch.library.register_autograd("sparsify::changes", _backward, setup_context=_setup, lib=LIBRARY)
op = torch.ops.sparsify.changes.default
