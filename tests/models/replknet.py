"""Scaling Up Your Kernels to 31x31 (RepLKNet), arXiv:2203.06717. RepLKNet-31B has 79 M parameters; here mostly narrower ones of its structure."""

from __future__ import annotations

from torch import Tensor, nn

from models.fastvit import LargeKernel
from models.fusing import ConvBN, like, preceded


class LargeKernelBlock(nn.Module):
    """norm, 1x1 conv, large depthwise conv, 1x1 conv; skip."""

    def __init__(self, channels: int, size: int, small: int = 5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.pw1 = ConvBN(channels, channels, 1, act=nn.ReLU())
        self.large = LargeKernel(channels, channels, size, small, 1, groups=channels)
        self.act = nn.ReLU()
        self.pw2 = ConvBN(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.pw2(self.act(self.large(self.pw1(self.norm(x)))))
        return y

    def by_hand(self) -> nn.Module:
        """The authors keep the first norm; it belongs into the conv behind it, which does not pad."""
        first = like(self.pw1[0], preceded(self.norm, self.pw1.kernel()))
        return Residual(first, nn.ReLU(), self.large, self.act, self.pw2)


class PointwiseFFN(nn.Module):
    """norm, 1x1 conv, GELU, 1x1 conv; skip."""

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.pw1, self.act, self.pw2 = ConvBN(channels, channels * ratio, 1), nn.GELU(), ConvBN(channels * ratio, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.pw2(self.act(self.pw1(self.norm(x))))
        return y

    def by_hand(self) -> nn.Module:
        return Residual(like(self.pw1[0], preceded(self.norm, self.pw1.kernel())), self.act, self.pw2)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + super().forward(x)
        return y


class RepLKNet(nn.Module):
    """A stem of stride 4, stages of alternating large-kernel and FFN blocks, transitions of stride 2, norm, mean, classifier."""

    def __init__(self, layers: tuple[int, ...], widths: tuple[int, ...], sizes: tuple[int, ...], classes: int = 1000) -> None:
        super().__init__()
        first = widths[0]
        self.stem = nn.Sequential(
            ConvBN(3, first, 3, 2, act=nn.ReLU()), ConvBN(first, first, 3, groups=first, act=nn.ReLU()),
            ConvBN(first, first, 1, act=nn.ReLU()), ConvBN(first, first, 3, 2, groups=first, act=nn.ReLU()))
        stages: list[nn.Module] = []
        before = first
        for i, (count, width, size) in enumerate(zip(layers, widths, sizes, strict=True)):
            if i:
                stages += [ConvBN(before, width, 1, act=nn.ReLU()), ConvBN(width, width, 3, 2, groups=width, act=nn.ReLU())]
            for _ in range(count):
                stages += [LargeKernelBlock(width, size), PointwiseFFN(width)]
            before = width
        self.stages = nn.Sequential(*stages)
        self.norm, self.head = nn.BatchNorm2d(before), nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.stages(self.stem(x))).mean((2, 3)))
        return y


def replknet_31b() -> nn.Module:
    return RepLKNet((2, 2, 18, 2), (128, 256, 512, 1024), (31, 29, 27, 13))


def replknet_small() -> nn.Module:
    """A quarter of the width and fewer blocks; the published kernels."""
    return RepLKNet((2, 2, 4, 2), (32, 64, 128, 256), (31, 29, 27, 13))


def replknet_tiny() -> nn.Module:
    return RepLKNet((1, 1), (8, 16), (13, 7), 10)
