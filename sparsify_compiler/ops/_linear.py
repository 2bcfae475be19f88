"""What the sparse linear ops share: registration, the implementation that runs everywhere, shapes, gradients.

y[..., n] = bias[n] + sum over the KEPT places of W[n, k] * x[..., k], so a NaN or infinity in x[..., k] reaches only the rows that keep k.
Sums are taken in float32 (float64 for float64); y has the dtype and device of x, whatever the dtype of the values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.formats._base import Format

# A FRAGMENT library with named kernels costs about half of torch.library.custom_op a call (6 against 12 µs). It must stay alive.
LIBRARY: Any = torch.library.Library("sparsify", "FRAGMENT")  # type: ignore[no-untyped-call]
CHUNK = 1 << 24  # elements of products that a reference may hold at once


def compute_dtype(x: Tensor, values: Tensor) -> torch.dtype:
    """The dtype that sums are taken in: at least float32."""
    return torch.promote_types(torch.promote_types(x.dtype, values.dtype), torch.float32)


def register(kind: type[Format], reference: Callable[..., Tensor]) -> Any:
    """Define `sparsify::linear_<format>` with the format's tensors and attributes as arguments. Returns the OpOverload."""
    name = f"linear_{kind.name()}"
    tensors = ", ".join(f"Tensor {t}" for t in kind.TENSORS)
    attributes = ", ".join(f"int {a}" for a in kind.ATTRIBUTES)
    LIBRARY.define(f"{name}(Tensor x, {tensors}, Tensor? bias=None, *, {attributes}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))

    def fake(x: Tensor, *stored: Tensor | None, out_features: int, in_features: int, **rest: Any) -> Tensor:
        _check_width(name, x, in_features)
        return x.new_empty((*x.shape[:-1], out_features))

    def everywhere(x: Tensor, *arguments: Tensor | None, **named: Any) -> Tensor:
        stored, bias = _split(kind, arguments, named)
        _check_width(name, x, stored.in_features)
        if not bool(torch.isfinite(x).all()):  # the dense product would spread it to every row
            return reference(x, *stored.tensors().values(), bias, **stored.attributes())
        dtype = compute_dtype(x, stored.values)
        return linear(x.to(dtype), stored.decode().to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)

    LIBRARY.impl(name, everywhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsify::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"sparsify::{name}", _backward, setup_context=_setup(kind), lib=LIBRARY)
    return getattr(torch.ops.sparsify, name).default


def _check_width(name: str, x: Tensor, in_features: int) -> None:
    fits = x.dim() >= 1 and x.shape[-1] == in_features
    torch._check(fits, lambda: f"{name}: x has shape {tuple(x.shape)}, needs [..., {in_features}]")  # type: ignore[no-untyped-call]


def _split(kind: type[Format], arguments: tuple[Tensor | None, ...], named: dict[str, Any]) -> tuple[Format, Tensor | None]:
    """The format object and the bias of a call's arguments after x."""
    given: dict[str, Any] = dict(zip((*kind.TENSORS, "bias"), arguments, strict=False))
    given.update(named)
    bias = given.pop("bias", None)
    return kind(**given), bias


def _setup(kind: type[Format]) -> Callable[..., None]:
    def setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
        x, *arguments = inputs
        stored, bias = _split(kind, tuple(arguments), keyword_only_inputs)
        ctx.kind, ctx.attributes, ctx.bias_dtype = kind, stored.attributes(), None if bias is None else bias.dtype
        ctx.save_for_backward(x, *stored.tensors().values())

    return setup


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, values and bias; index tensors have none."""
    x, *tensors = ctx.saved_tensors
    stored = ctx.kind(**dict(zip(ctx.kind.TENSORS, tensors, strict=True)), **ctx.attributes)
    dtype = compute_dtype(x, stored.values)
    rows = grad.reshape(-1, grad.shape[-1]).to(dtype)
    for_x = for_values = for_bias = None
    if ctx.needs_input_grad[0]:
        for_x = (rows @ stored.decode().to(dtype)).to(x.dtype).reshape(x.shape)
    if ctx.needs_input_grad[1]:
        dense = rows.T @ x.reshape(-1, x.shape[-1]).to(dtype)
        for_values = stored.gather(dense).to(stored.values.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[1 + len(tensors)]:
        for_bias = rows.sum(0).to(ctx.bias_dtype)
    return (for_x, for_values, *(None for _ in tensors[1:]), for_bias)
