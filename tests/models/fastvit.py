"""FastViT: A Fast Hybrid Vision Transformer using Structural Reparameterization, arXiv:2303.14189.

T8, which has no attention stage, has 4.0 M parameters as trained and 3.6 M deployed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.fusing import ConvBN, Kernel, framed, identity, like, plain, scaled, summed
from models.mobileone import MobileOneBlock


class LayerScale(nn.Module):
    """One trained factor a channel, [C, 1, 1]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class RepMixer(nn.Module):
    """x + scale * (mixer(x) - norm(x)): a token mixer that is one depthwise conv."""

    def __init__(self, channels: int, size: int = 3) -> None:
        super().__init__()
        self.channels, self.size = channels, size
        self.norm = MobileOneBlock(channels, channels, size, groups=channels, branches=0, scale=False)
        self.mixer = MobileOneBlock(channels, channels, size, groups=channels)
        self.layer_scale = LayerScale(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layer_scale(self.mixer(x) - self.norm(x))
        return y

    def by_hand(self) -> nn.Module:
        (w, b), (v, c) = self.mixer.kernel(), self.norm.kernel()
        weight, bias = scaled((w - v, b - c), self.layer_scale.gamma)
        kernel = weight + identity(self.channels, self.channels, self.size).to(weight.device), bias
        return like(self.mixer.convs[0][0], kernel)  # type: ignore[index]


class ConvFFN(nn.Module):
    """A depthwise 7x7 conv with its norm, then two pointwise convs around a GELU."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.conv = ConvBN(channels, channels, 7, groups=channels)
        self.fc1, self.act, self.fc2 = nn.Conv2d(channels, channels * ratio, 1), nn.GELU(), nn.Conv2d(channels * ratio, channels, 1)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(self.fc2(self.drop(self.act(self.fc1(self.conv(x))))))
        return y


class RepMixerBlock(nn.Module):
    """Token mixer, then a ConvFFN with a layer scale and a skip."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.token_mixer, self.mlp, self.layer_scale = RepMixer(channels), ConvFFN(channels, ratio), LayerScale(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        y: Tensor = x + self.layer_scale(self.mlp(x))
        return y

    def by_hand(self) -> nn.Module:
        """The authors leave the layer scale of the FFN where it is; it belongs into the last pointwise conv."""
        self.mlp.fc2 = like(self.mlp.fc2, scaled(plain(self.mlp.fc2), self.layer_scale.gamma))
        return Skip(self.token_mixer, self.mlp)


class Skip(nn.Module):
    def __init__(self, before: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.before, self.body = before, body

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        y: Tensor = x + self.body(x)
        return y


class LargeKernel(nn.Module):
    """RepLKNet's pair: a large conv and a small one beside it, each with its norm."""

    def __init__(self, inputs: int, outputs: int, size: int, small: int, stride: int, groups: int) -> None:
        super().__init__()
        self.size = size
        self.large, self.small = ConvBN(inputs, outputs, size, stride, groups=groups), ConvBN(inputs, outputs, small, stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.large(x) + self.small(x)
        return y

    def kernel(self) -> Kernel:
        return summed([self.large.kernel(), framed(self.small.kernel(), self.size)])

    def by_hand(self) -> nn.Module:
        return like(self.large[0], self.kernel())


class Gate(nn.Module):
    """Squeeze and excite: channels scaled by what two 1x1 convs see in their means."""

    def __init__(self, channels: int, ratio: float = 1 / 16) -> None:
        super().__init__()
        hidden = int(channels * ratio)
        self.reduce, self.expand = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


@dataclass(frozen=True)
class Shape:
    layers: tuple[int, ...]
    widths: tuple[int, ...]
    ratio: int
    classes: int = 1000


class FastViT(nn.Module):
    """MobileOne stem (stride 4), stages of RepMixer blocks with a patch embedding (stride 2) between, a gated depthwise conv, classifier."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        first, last = shape.widths[0], shape.widths[-1]
        self.stem = nn.Sequential(MobileOneBlock(3, first, 3, 2, act=nn.GELU()),
                                  MobileOneBlock(first, first, 3, 2, groups=first, act=nn.GELU()), MobileOneBlock(first, first, 1, act=nn.GELU()))
        stages: list[nn.Module] = []
        before = first
        for count, width in zip(shape.layers, shape.widths, strict=True):
            if width != before:
                stages += [LargeKernel(before, width, 7, 3, 2, groups=before), MobileOneBlock(width, width, 1, act=nn.GELU())]
            stages += [RepMixerBlock(width, shape.ratio) for _ in range(count)]
            before = width
        self.stages = nn.Sequential(*stages)
        self.final = MobileOneBlock(last, 2 * last, 3, groups=last, act=nn.GELU(), gate=Gate(2 * last))
        self.head = nn.Linear(2 * last, shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.final(self.stages(self.stem(x))).mean((2, 3)))
        return y


def fastvit_t8() -> nn.Module:
    return FastViT(Shape((2, 2, 4, 2), (48, 96, 192, 384), 3))


def fastvit_tiny() -> nn.Module:
    """Two stages of one block each."""
    return FastViT(Shape((1, 1), (16, 32), 2, 10))
