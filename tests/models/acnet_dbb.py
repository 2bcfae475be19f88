"""Blocks that stand for one conv: ACNet, arXiv:1908.03930, and the Diverse Branch Block, arXiv:2103.13425, with their authors' borders."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from models.fusing import ConvBN, Kernel, framed, fused, identity, like, scale_and_shift, summed


class ACBlock(nn.Module):
    """3x3, 1x3 and 3x1, each with its norm. Where the square conv pads less than 1, the others see a cropped image."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1, padding: int = 1) -> None:
        super().__init__()
        self.crop = 1 - padding
        self.square = ConvBN(inputs, outputs, 3, stride, padding, groups)
        self.wide = ConvBN(inputs, outputs, (1, 3), stride, (0, padding), groups)
        self.tall = ConvBN(inputs, outputs, (3, 1), stride, (padding, 0), groups)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (x[:, :, 1:-1, :], x[:, :, :, 1:-1]) if self.crop else (x, x)
        y: Tensor = self.square(x) + self.wide(rows) + self.tall(columns)
        return y

    def by_hand(self) -> nn.Module:
        return like(self.square[0], summed(framed(branch.kernel(), 3) for branch in (self.square, self.wide, self.tall)))


class NormAndPad(nn.Module):
    """A norm whose output is padded with what the norm makes of a zero, so that the conv behind meets no other border than it would alone."""

    def __init__(self, channels: int, width: int, affine: bool = True) -> None:
        super().__init__()
        self.norm, self.width = nn.BatchNorm2d(channels, affine=affine), width

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        if not (w := self.width):
            return out
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        if self.norm.affine:
            value = self.norm.bias.detach() - self.norm.running_mean * self.norm.weight.detach() / torch.sqrt(self.norm.running_var + self.norm.eps)
        else:
            value = -self.norm.running_mean / torch.sqrt(self.norm.running_var + self.norm.eps)
        out, value = pad(out, [w] * 4), value.view(1, -1, 1, 1)
        out[:, :, :w, :] = value
        out[:, :, -w:, :] = value
        out[:, :, :, :w] = value
        out[:, :, :, -w:] = value
        return out


class IdentityConv(nn.Conv2d):
    """A 1x1 conv that learns the difference from the identity."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__(channels, channels, 1, groups=groups, bias=False)
        nn.init.normal_(self.weight, 0, 0.1)
        self.eye: Tensor
        self.register_buffer("eye", identity(channels, groups).to(self.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight + self.eye, None, self.stride, self.padding, self.dilation, self.groups)


class DBBlock(nn.Module):
    """A kxk conv; a 1x1; a 1x1 then kxk; a 1x1 then average pool: each with its norms. A depthwise block has no 1x1 before its pool."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1, size: int = 3, inner: int | None = None) -> None:
        super().__init__()
        p, self.groups, self.size, self.depthwise = size // 2, groups, size, groups == outputs
        self.origin = ConvBN(inputs, outputs, size, stride, p, groups)
        self.pointwise = None if self.depthwise else ConvBN(inputs, outputs, 1, stride, 0, groups)
        if self.depthwise:
            self.average = nn.Sequential(nn.AvgPool2d(size, stride, p), nn.BatchNorm2d(outputs))
        else:
            self.average = nn.Sequential(nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False), NormAndPad(outputs, p),
                                         nn.AvgPool2d(size, stride), nn.BatchNorm2d(outputs))
        inner = inner or (2 * inputs if self.depthwise else inputs)
        first = IdentityConv(inputs, groups) if inner == inputs else nn.Conv2d(inputs, inner, 1, groups=groups, bias=False)
        self.sequence = nn.Sequential(first, NormAndPad(inner, p), nn.Conv2d(inner, outputs, size, stride, groups=groups, bias=False),
                                      nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.origin(x)
        if self.pointwise is not None:
            out = out + self.pointwise(x)
        out = out + self.average(x)
        y: Tensor = out + self.sequence(x)
        return y

    def by_hand(self) -> nn.Module:
        branches = [self.origin.kernel(), self._average(), self._sequence()]
        if self.pointwise is not None:
            branches.append(framed(self.pointwise.kernel(), self.size))
        return like(self.origin[0], summed(branches))

    def _average(self) -> Kernel:
        norm = self.average[-1]
        pool = identity(self.origin[0].out_channels, self.groups).expand(-1, -1, self.size, self.size) / self.size ** 2
        s, t = scale_and_shift(norm)
        second = pool * s[:, None, None, None], t
        if self.depthwise:
            return second
        return chained(_then_norm(self.average[0], self.average[1].norm), second, self.groups)

    def _sequence(self) -> Kernel:
        first, middle, second, norm = self.sequence
        return chained(_then_norm(first, middle.norm), fused(second, norm), self.groups)


def _then_norm(conv: nn.Conv2d, norm: nn.Module) -> Kernel:
    weight, bias = fused(conv, norm)
    if isinstance(conv, IdentityConv):
        weight = weight + conv.eye.double() * scale_and_shift(norm)[0][:, None, None, None]
    return weight, bias


def chained(first: Kernel, second: Kernel, groups: int) -> Kernel:
    """A 1x1 conv and the conv behind it as one conv, group by group; exact where the second meets no zeros of its own padding."""
    weights, biases = [], []
    for w1, b1, w2 in zip(*(tensor.chunk(groups) for tensor in (*first, second[0])), strict=True):
        weights.append(conv2d(w2, w1.permute(1, 0, 2, 3)))
        biases.append((w2 * b1[None, :, None, None]).sum((1, 2, 3)))
    return torch.cat(weights), torch.cat(biases) + second[1]


class Blocks(nn.Module):
    """Blocks with a ReLU each, mean over the image, classifier."""

    def __init__(self, blocks: Iterable[nn.Module], last: int, classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(layer for block in blocks for layer in (block, nn.ReLU())))
        self.head = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return y


def _pyramid(block: Callable[[int, int, int], nn.Module]) -> nn.Module:
    """Two blocks a width, the first with stride 2."""
    widths = (48, 96, 192, 384)
    pairs = zip((3, *widths), widths, strict=False)
    return Blocks((b for i, o in pairs for b in (block(i, o, 2), block(o, o, 1))), widths[-1], 1000)


def acnet() -> nn.Module:
    return _pyramid(ACBlock)


def dbb() -> nn.Module:
    return _pyramid(DBBlock)


def acnet_tiny() -> nn.Module:
    """Strides, groups, and squares that do not pad, so that the other branches are cropped."""
    return Blocks([ACBlock(3, 8, 2), ACBlock(8, 8, groups=4), ACBlock(8, 12, 2, padding=0), ACBlock(12, 12, padding=0)], 12, 10)


def dbb_tiny() -> nn.Module:
    """Identity-based and wide inner convs, 5x5 kernels, groups, and a depthwise block before a pointwise conv."""
    return Blocks([DBBlock(3, 8, 2), DBBlock(8, 8, size=5, inner=12), DBBlock(8, 8, groups=2), DBBlock(8, 8, 2, groups=8), ConvBN(8, 12, 1)], 12, 10)
