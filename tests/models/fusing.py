"""Reparameterisation by hand in plain torch: what networks of several branches are written with, and what collapses them.

A module that can be collapsed has `by_hand() -> nn.Module`. All arithmetic is in float64, whatever the dtype of the model, so that the results
serve as a yardstick of exactness.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

Pair = tuple[int, int]
Kernel = tuple[Tensor, Tensor]  # weight [out, in / groups, kh, kw] and bias [out], both float64


def pair(value: int | Pair) -> Pair:
    return value if isinstance(value, tuple) else (value, value)


class ConvBN(nn.Sequential):
    """A conv without bias and the norm of its outputs. By default the padding keeps the size."""

    def __init__(self, inputs: int, outputs: int, size: int | Pair, stride: int = 1, padding: int | Pair | None = None, groups: int = 1,
                 act: nn.Module | None = None) -> None:
        rows, columns = pair(size)
        around = (rows // 2, columns // 2) if padding is None else padding
        conv = nn.Conv2d(inputs, outputs, (rows, columns), stride, around, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), *([] if act is None else [act]))

    def kernel(self) -> Kernel:
        conv, norm, *_ = self
        assert isinstance(conv, nn.Conv2d)
        return fused(conv, norm)

    def by_hand(self) -> nn.Module:
        conv, _, *act = self
        assert isinstance(conv, nn.Conv2d)
        merged = like(conv, self.kernel())
        return nn.Sequential(merged, *act) if act else merged


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A norm of running statistics as s * x + t."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    s = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        s = s * norm.weight.detach().double()
    t = -norm.running_mean.double() * s
    return s, t if norm.bias is None else t + norm.bias.detach().double()


def plain(conv: nn.Module) -> Kernel:
    """A conv's own weight and bias, zeros where it has none."""
    assert isinstance(conv, nn.Conv2d)
    weight = conv.weight.detach().double()
    return weight, weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias.detach().double()


def fused(conv: nn.Conv2d, norm: nn.Module) -> Kernel:
    (weight, bias), (s, t) = plain(conv), scale_and_shift(norm)
    return weight * s[:, None, None, None], bias * s + t


def preceded(norm: nn.Module, kernel: Kernel) -> Kernel:
    """A norm before an ungrouped conv that does not pad."""
    (s, t), (weight, bias) = scale_and_shift(norm), kernel
    return weight * s[None, :, None, None], bias + (weight * t[None, :, None, None]).sum((1, 2, 3))


def identity(channels: int, groups: int, size: int | Pair = 1) -> Tensor:
    """The kernel that hands every channel through."""
    rows, columns = pair(size)
    weight = torch.zeros(channels, channels // groups, rows, columns, dtype=torch.float64)
    each = torch.arange(channels)
    weight[each, each % (channels // groups), rows // 2, columns // 2] = 1
    return weight


def identity_norm(norm: nn.Module, channels: int, groups: int, size: int | Pair) -> Kernel:
    s, t = scale_and_shift(norm)
    return identity(channels, groups, size).to(s.device) * s[:, None, None, None], t


def framed(kernel: Kernel, size: int | Pair) -> Kernel:
    """A smaller kernel in a frame of zeros."""
    weight, bias = kernel
    rows, columns = ((a - b) // 2 for a, b in zip(pair(size), weight.shape[2:], strict=True))
    return pad(weight, (columns, columns, rows, rows)), bias


def summed(kernels: Iterable[Kernel]) -> Kernel:
    weights, biases = zip(*kernels, strict=True)
    return torch.stack(list(torch.broadcast_tensors(*weights))).sum(0), torch.stack(biases).sum(0)


def scaled(kernel: Kernel, gamma: Tensor) -> Kernel:
    """Followed by one factor an output channel."""
    weight, bias = kernel
    factor = gamma.detach().double().reshape(-1)
    return weight * factor[:, None, None, None], bias * factor


def like(conv: nn.Conv2d, kernel: Kernel, padding: Any = None) -> nn.Conv2d:
    """A conv of the same stride, groups and dtype, with this kernel. By default it pads as much as keeps the alignment of a larger kernel."""
    weight, bias = kernel
    if padding is None:
        padding = tuple(p + (new - old) // 2 for p, new, old in zip(pair(conv.padding), weight.shape[2:], conv.kernel_size, strict=True))
    inputs = weight.shape[1] * conv.groups
    made = nn.Conv2d(inputs, weight.shape[0], tuple(weight.shape[2:]), conv.stride, padding, groups=conv.groups,
                     dtype=conv.weight.dtype, device=conv.weight.device)
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)
    return made


def linear_like(example: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=example.weight.dtype, device=example.weight.device)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made


def reparameterised_by_hand(model: nn.Module) -> nn.Module:
    """A copy of an eval-mode model in which every module that can be collapsed is: the outermost ones first."""
    return _replaced(copy.deepcopy(model).eval()).eval()


def _replaced(module: nn.Module) -> nn.Module:
    if hasattr(module, "by_hand"):
        return _replaced(module.by_hand())
    for name, child in list(module.named_children()):
        setattr(module, name, _replaced(child))
    return module


def randomise(model: nn.Module, example: Tensor, seed: int = 0) -> nn.Module:
    """Parameters and statistics as after training, in eval mode: never the fresh zeros and ones, under which errors hide.

    A norm's statistics are near those of what it meets when the model sees `example`, and not equal to them, so that numbers neither die out nor
    explode along a deep network and its output still depends on its input.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5, generator=draw)
                module.bias.normal_(0, 0.3, generator=draw)
            for name in ("gamma", "token", "positions"):
                if isinstance(own := getattr(module, name, None), nn.Parameter):
                    own.normal_(0, 0.5, generator=draw)

        def settle(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].transpose(0, 1).flatten(1)
            mean, spread = x.mean(1), x.std(1)
            spread = (spread ** 2 + mean ** 2 + 4 * spread.mean() ** 2).sqrt()  # random norms that blow up what varies little make deep nets chaotic
            norm.running_mean.copy_(mean + 0.3 * spread * torch.randn(mean.shape, generator=draw))  # type: ignore[union-attr, operator]
            norm.running_var.copy_(spread ** 2 * (1 + torch.rand(mean.shape, generator=draw)))  # type: ignore[union-attr, operator]

        norms = [m for m in model.eval().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
        hooks = [norm.register_forward_pre_hook(settle) for norm in norms]
        model(example)
        for hook in hooks:
            hook.remove()
    return model


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, C, H, W]: coarse blobs and fine noise, so that images differ from each other in their means too."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.randn(*shape[:2], 3, 3, generator=draw)
    return (interpolate(coarse, shape[2:], mode="bilinear") + 0.5 * torch.randn(shape, generator=draw)).to(dtype)


def parameters_in_millions(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6
