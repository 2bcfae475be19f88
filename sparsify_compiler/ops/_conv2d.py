"""What the sparse convolutions share: a linear op over the patches of x.

The weight [O, I / groups, kh, kw] is stored as the matrix [O, I / groups * kh * kw], rows in the weight's own order (input, then ky, then kx), in the
formats of linear layers; a 1×1 convolution is the linear layer over the channels of each place. Only kept places contribute, as in ops/_linear.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import grad as conv_grad
from torch.nn.functional import conv2d, unfold

from sparsify_compiler.formats._base import Format

from ._linear import LIBRARY, compute_dtype

PAIRS = ("kernel_size", "stride", "padding", "dilation")  # two numbers each: along the height, along the width


def register(kind: type[Format], linear: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], Any]:
    """Define `sparsify::conv2d_<format>` with the format's tensors, its attributes and the geometry. Returns the reference and the OpOverload.

    linear  the reference of the format's linear op
    """
    name = f"conv2d_{kind.name()}"
    tensors = ", ".join(f"Tensor {t}" for t in kind.TENSORS)
    numbers = ", ".join([*(f"int {a}" for a in kind.ATTRIBUTES), *(f"int[2] {p}" for p in PAIRS), "int groups"])
    LIBRARY.define(f"{name}(Tensor x, {tensors}, Tensor? bias=None, *, {numbers}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))

    def reference(x: Tensor, *arguments: Tensor | None, **named: Any) -> Tensor:
        """y[b, o, p] = bias[o] + sum over the kept (i, ky, kx) of o of weight * x[b, group of o + i, p * stride + (ky, kx) * dilation - padding].

        x [B, I, H, W] any float dtype -> y [B, O, H', W'] of the same dtype; sums in at least float32.
        """
        stored, geometry, bias = _split(kind, arguments, named)
        outputs = stored.out_features // int(geometry["groups"])
        dtype = compute_dtype(x, stored.values)
        patches = unfold(x.to(dtype), geometry["kernel_size"], geometry["dilation"], geometry["padding"], geometry["stride"])
        parts = []
        for group, rows in enumerate(torch.split(patches.transpose(1, 2), stored.in_features, 2)):
            parts.append(linear(rows, *stored.tensors().values(), bias, **stored.attributes())[..., group * outputs : (group + 1) * outputs])
        size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(x.shape[2:], *(geometry[pair] for pair in PAIRS), strict=True)]
        return _laid_out(torch.cat(parts, -1).transpose(1, 2).reshape(x.shape[0], stored.out_features, *size).to(x.dtype), x)

    def fake(x: Tensor, *arguments: Tensor | None, **named: Any) -> Tensor:
        stored, geometry, _ = _split(kind, arguments, named)
        _check(name, x, stored, geometry)
        weight = _shaped(x.new_empty((stored.out_features, stored.in_features)), geometry)
        return _laid_out(conv2d(x, weight, None, **_places(geometry), groups=geometry["groups"]), x)

    def everywhere(x: Tensor, *arguments: Tensor | None, **named: Any) -> Tensor:
        stored, geometry, bias = _split(kind, arguments, named)
        _check(name, x, stored, geometry)
        if not bool(torch.isfinite(x).all()):  # the dense product would spread it to every output
            return reference(x, *arguments, **named)
        dtype = compute_dtype(x, stored.values)
        weight = _shaped(stored.decode().to(dtype), geometry)
        y = conv2d(x.to(dtype), weight, None if bias is None else bias.to(dtype), **_places(geometry), groups=geometry["groups"])
        return _laid_out(y.to(x.dtype), x)

    LIBRARY.impl(name, everywhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsify::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"sparsify::{name}", _backward, setup_context=_setup(kind), lib=LIBRARY)
    return reference, getattr(torch.ops.sparsify, name).default


def _split(kind: type[Format], arguments: tuple[Tensor | None, ...], named: Mapping[str, Any]) -> tuple[Format, dict[str, Any], Tensor | None]:
    """The format object, the geometry and the bias of a call's arguments after x."""
    given: dict[str, Any] = dict(zip((*kind.TENSORS, "bias"), arguments, strict=False)) | dict(named)
    geometry = {pair: [int(n) for n in given.pop(pair)] for pair in PAIRS} | {"groups": given.pop("groups")}
    bias = given.pop("bias", None)
    return kind(**given), geometry, bias


def _places(geometry: Mapping[str, Any]) -> dict[str, list[int]]:
    return {pair: geometry[pair] for pair in PAIRS[1:]}


def _shaped(weight: Tensor, geometry: Mapping[str, Any]) -> Tensor:
    """The weight [O, I / groups, kh, kw] of its matrix."""
    height, width = geometry["kernel_size"]
    return weight.view(weight.shape[0], weight.shape[1] // max(height * width, 1), height, width)


def _laid_out(y: Tensor, x: Tensor) -> Tensor:
    """y channels last where x is so, else contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _check(name: str, x: Tensor, stored: Format, geometry: Mapping[str, Any]) -> None:
    height, width = geometry["kernel_size"]
    channels = stored.in_features // max(height * width, 1) * geometry["groups"]
    fits = x.dim() == 4 and x.shape[1] == channels
    torch._check(fits, lambda: f"{name}: x has shape {tuple(x.shape)}, needs [B, {channels}, H, W]")  # type: ignore[no-untyped-call]


def _setup(kind: type[Format]) -> Callable[..., None]:
    def setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
        x, *arguments = inputs
        stored, ctx.geometry, bias = _split(kind, tuple(arguments), keyword_only_inputs)
        ctx.kind, ctx.attributes, ctx.bias_dtype = kind, stored.attributes(), None if bias is None else bias.dtype
        ctx.save_for_backward(x, *stored.tensors().values())

    return setup


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, values and bias; index tensors have none."""
    x, *tensors = ctx.saved_tensors
    stored: Format = ctx.kind(**dict(zip(ctx.kind.TENSORS, tensors, strict=True)), **ctx.attributes)
    dtype = compute_dtype(x, stored.values)
    y, rest = gradient.to(dtype), (*_places(ctx.geometry).values(), ctx.geometry["groups"])
    for_x = for_values = for_bias = None
    weight = _shaped(stored.decode().to(dtype), ctx.geometry)
    if ctx.needs_input_grad[0]:
        for_x = conv_grad.conv2d_input(x.shape, weight, y, *rest).to(x.dtype)  # type: ignore[no-untyped-call]
    if ctx.needs_input_grad[1]:
        dense = conv_grad.conv2d_weight(x.to(dtype), weight.shape, y, *rest)  # type: ignore[no-untyped-call]
        for_values = stored.gather(dense.flatten(1)).to(stored.values.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[1 + len(tensors)]:
        for_bias = y.sum((0, 2, 3)).to(ctx.bias_dtype)
    return (for_x, for_values, *(None for _ in tensors[1:]), for_bias)
