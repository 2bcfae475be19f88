"""Operators that torch binds to Python directly: a call costs a microsecond or two less than through torch.ops, and computes the same.

Each function takes the arguments of its operator in the order of the schema. What has no direct binding, or one that reads its arguments in
another way, is called through torch.ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

aten, _nn = torch.ops.aten, torch._C._nn


def _pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """Constants around images are written at the border only; torch fills the whole first, and then copies x over it."""
    plain = mode == "constant" and len(pad) == 4 and x.dim() == 4 and min(pad) >= 0 and max(pad) > 0 and min(x.shape[1:]) > 1 and x.shape[0] > 0
    if not plain or (x.requires_grad and torch.is_grad_enabled()):
        return _nn.pad(x, pad, mode, value)
    (left, right, top, bottom), (batch, channels, height, width) = pad, x.shape
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    y = torch.empty((batch, channels, height + top + bottom, width + left + right), dtype=x.dtype, device=x.device, memory_format=layout)
    y[:, :, top:top + height, left:left + width].copy_(x)
    for dim, size, before, after in ((2, height, top, bottom), (3, width, left, right)):
        for start, length in ((0, before), (before + size, after)):
            if length:
                y.narrow(dim, start, length).fill_(value or 0.0)
    return y


DIRECT: Mapping[Any, Callable[..., Any]] = {
    aten.linear.default: _nn.linear, aten.conv1d.default: torch.conv1d, aten.conv2d.default: torch.conv2d, aten.conv3d.default: torch.conv3d,
    aten.layer_norm.default: torch.layer_norm, aten.matmul.default: torch.matmul, aten.softmax.int: torch.softmax,
    aten.scaled_dot_product_attention.default: _nn.scaled_dot_product_attention,
    aten.relu.default: torch.relu, aten.gelu.default: _nn.gelu, aten.silu.default: _nn.silu, aten.sigmoid.default: torch.sigmoid,
    aten.tanh.default: torch.tanh, aten.hardtanh.default: _nn.hardtanh, aten.hardswish.default: _nn.hardswish,
    aten.add.Tensor: torch.add, aten.sub.Tensor: torch.sub, aten.mul.Tensor: torch.mul, aten.div.Tensor: torch.div,
    aten.mean.dim: torch.mean, aten.adaptive_avg_pool2d.default: _nn.adaptive_avg_pool2d, aten.avg_pool2d.default: _nn.avg_pool2d,
    aten.max_pool2d.default: torch.max_pool2d, aten.pad.default: _pad,
    aten.reshape.default: torch.reshape, aten.view.default: torch.Tensor.view, aten.permute.default: torch.permute,
    aten.transpose.int: torch.transpose, aten.flatten.using_ints: torch.flatten, aten.unsqueeze.default: torch.unsqueeze,
    aten.squeeze.dim: torch.squeeze, aten.unbind.int: torch.unbind, aten.select.int: torch.select, aten.chunk.default: torch.chunk,
    aten.cat.default: torch.cat,
}  # fmt: skip
