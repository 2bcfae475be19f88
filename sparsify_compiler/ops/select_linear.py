"""select_linear: y = select(x) W^T + bias, which reads the weights of the selected inputs only: W lies input by input in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import select as chosen
from ._linear import LIBRARY, compute_dtype


def reference(x: Tensor, limit: Tensor, weight: Tensor, scale: Tensor | None = None, center: Tensor | None = None,
              bias: Tensor | None = None) -> Tensor:
    """y[..., n] = bias[n] + sum over k of weight[k, n] * s[..., k], s = x where |x - center| * scale reaches the limit, the centre elsewhere.

    x [..., K] any float dtype -> y [..., N] of the same dtype; weight [K, N]; limit [] or [..., 1]; scale and center [K] or None; sums in at
    least float32. A NaN of x is always selected.
    """
    dtype = compute_dtype(x, weight)
    rows = chosen.reference(x, limit, scale, center).to(dtype)
    return linear(rows, weight.to(dtype).t(), None if bias is None else bias.to(dtype)).to(x.dtype)


def _check(x: Tensor, weight: Tensor) -> None:
    fits = x.dim() >= 1 and weight.dim() == 2 and x.shape[-1] == weight.shape[0]
    torch._check(fits, lambda: f"select_linear: x has shape {tuple(x.shape)}, needs [..., {weight.shape[0]}]")  # type: ignore[no-untyped-call]


def _everywhere(x: Tensor, limit: Tensor, weight: Tensor, scale: Tensor | None = None, center: Tensor | None = None,
                bias: Tensor | None = None) -> Tensor:
    _check(x, weight)
    if x.dtype is not weight.dtype or x.is_meta:
        return reference(x, limit, weight, scale, center, bias)
    return linear(chosen.op(x, limit, scale, center), weight.t(), None if bias is None else bias.to(x.dtype))


def _fake(x: Tensor, limit: Tensor, weight: Tensor, scale: Tensor | None = None, center: Tensor | None = None,
          bias: Tensor | None = None) -> Tensor:
    _check(x, weight)
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, limit, weight, scale, center, bias = inputs
    ctx.save_for_backward(x, limit, weight, scale, center)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, centre and bias; the choice itself has none."""
    x, limit, weight, scale, center = ctx.saved_tensors
    dtype, mask = compute_dtype(x, weight), chosen.kept(x, limit, scale, center)
    rows = grad.reshape(-1, grad.shape[-1]).to(dtype)
    for_x = for_weight = for_center = for_bias = None
    through = (grad.to(dtype) @ weight.to(dtype).t())
    if ctx.needs_input_grad[0]:
        for_x = through.masked_fill(~mask, 0).to(x.dtype)
    if ctx.needs_input_grad[2]:
        read = chosen.reference(x, limit, scale, center).reshape(-1, x.shape[-1]).to(dtype)
        for_weight = (read.t() @ rows).to(weight.dtype)
    if center is not None and ctx.needs_input_grad[4]:
        for_center = through.masked_fill(mask, 0).reshape(-1, x.shape[-1]).sum(0).to(center.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        for_bias = rows.sum(0).to(ctx.bias_dtype)
    return for_x, None, for_weight, None, for_center, for_bias


LIBRARY.define("select_linear(Tensor x, Tensor limit, Tensor weight, Tensor? scale=None, Tensor? center=None, Tensor? bias=None) -> Tensor",
               tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("select_linear", _everywhere, "CompositeExplicitAutograd")
torch.library.register_fake("sparsify::select_linear", _fake, lib=LIBRARY)
torch.library.register_autograd("sparsify::select_linear", _backward, setup_context=_setup, lib=LIBRARY)
op = torch.ops.sparsify.select_linear.default
