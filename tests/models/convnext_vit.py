"""ConvNeXt, arXiv:2201.03545, and ViT with RePaViT's channel-idle FFN, arXiv:2505.21847."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from models.fusing import linear_like, scale_and_shift


class ImageNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm, MLP, layer scale; skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.fc1, self.act, self.fc2 = nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(0, 2, 3, 1)
        y = self.gamma * self.fc2(self.act(self.fc1(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)

    def by_hand(self) -> nn.Module:
        return MergedConvNeXtBlock(self)


class MergedConvNeXtBlock(nn.Module):
    """The norm's affine is in the linear behind it, the layer scale in the one before it."""

    def __init__(self, block: ConvNeXtBlock) -> None:
        super().__init__()
        self.conv, self.act, self.eps = block.conv, block.act, block.norm.eps
        self.fc1 = _after_affine(block.norm, block.fc1)
        gamma = block.gamma.detach().double()
        self.fc2 = linear_like(block.fc2, block.fc2.weight.detach().double() * gamma[:, None], block.fc2.bias.detach().double() * gamma)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(0, 2, 3, 1)
        y = self.fc2(self.act(self.fc1(layer_norm(y, y.shape[-1:], eps=self.eps))))
        return x + y.permute(0, 3, 1, 2)


def _after_affine(norm: nn.LayerNorm, linear: nn.Linear) -> nn.Linear:
    weight, bias = linear.weight.detach().double(), linear.bias.detach().double()
    return linear_like(linear, weight * norm.weight.detach().double(), bias + weight @ norm.bias.detach().double())


class ConvNeXt(nn.Module):
    """A stem of stride 4, stages of blocks with a norm and a 2x2 conv of stride 2 between, mean, norm, classifier."""

    def __init__(self, layers: tuple[int, ...], widths: tuple[int, ...], classes: int = 1000) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), ImageNorm(widths[0], eps=1e-6)]
        before = widths[0]
        for count, width in zip(layers, widths, strict=True):
            if width != before:
                parts += [ImageNorm(before, eps=1e-6), nn.Conv2d(before, width, 2, 2)]
            parts += [ConvNeXtBlock(width) for _ in range(count)]
            before = width
        self.body, self.norm, self.head = nn.Sequential(*parts), nn.LayerNorm(before, eps=1e-6), nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.body(x).mean((2, 3))))
        return y


class RePaFFN(nn.Module):
    """An FFN of which only a part of the hidden channels passes the activation; the rest, idle, is a linear path.

    With norm="batch" a norm stands before each linear, and all is linear but the active channels: the skip goes into the merged linear too.
    `spelling` is how the idle channels are kept from the activation: "where" with a mask, as the authors' code does, or "split" and concatenate.
    """

    def __init__(self, channels: int, hidden: int, idle: float = 0.75, norm: str = "batch", spelling: str = "where") -> None:
        super().__init__()
        self.active, self.batch, self.spelling = math.ceil(hidden * (1 - idle)), norm == "batch", spelling
        self.norm1 = nn.BatchNorm1d(channels) if self.batch else nn.LayerNorm(channels, eps=1e-6)
        self.norm2 = nn.BatchNorm1d(hidden) if self.batch else nn.Identity()
        self.fc1, self.act, self.fc2 = nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(self._norm(self.norm1, x))
        if self.active == y.shape[-1]:
            y = self.act(y)
        elif self.spelling == "split":
            y = torch.cat([self.act(y[..., : self.active]), y[..., self.active:]], dim=-1)
        else:
            mask = torch.zeros_like(y, dtype=torch.bool)
            mask[:, :, : self.active] = True
            y = torch.where(mask, self.act(y), y)
        y = self.fc2(self._norm(self.norm2, y))
        return y + x

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = norm(x.transpose(-1, -2)).transpose(-1, -2) if self.batch else norm(x)
        return y

    def by_hand(self) -> nn.Module:
        return MergedRePaFFN(self)


class MergedRePaFFN(nn.Module):
    """`direct`, square, is the idle path (and the skip where norms are linear); the active channels pass two thin linears."""

    def __init__(self, ffn: RePaFFN) -> None:
        super().__init__()
        w1, b1, w2, b2 = (t.detach().double() for t in (ffn.fc1.weight, ffn.fc1.bias, ffn.fc2.weight, ffn.fc2.bias))
        if ffn.batch:
            (s1, t1), (s2, t2) = scale_and_shift(ffn.norm1), scale_and_shift(ffn.norm2)
            w1, b1, w2, b2 = w1 * s1, b1 + w1 @ t1, w2 * s2, b2 + w2 @ t2
        n = ffn.active
        direct = w2[:, n:] @ w1[n:]
        if ffn.batch:
            direct = direct + torch.eye(direct.shape[0], dtype=direct.dtype, device=direct.device)
        self.norm = None if ffn.batch else ffn.norm1
        self.direct = linear_like(ffn.fc1, direct, b2 + w2[:, n:] @ b1[n:])
        self.fc1, self.act, self.fc2 = linear_like(ffn.fc1, w1[:n], b1[:n]), ffn.act, linear_like(ffn.fc2, w2[:, :n], None)

    def forward(self, x: Tensor) -> Tensor:
        z = x if self.norm is None else self.norm(x)
        y: Tensor = self.direct(z) + self.fc2(self.act(self.fc1(z)))
        return y if self.norm is None else y + x


class Attention(nn.Module):
    """LayerNorm, multi-head attention, projection; skip."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(channels, eps=1e-6), nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        y = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(y)


class ViT(nn.Module):
    """Patches by a conv, class token, positions, blocks, norm, classifier."""

    def __init__(self, channels: int, depth: int, heads: int, image: int = 224, patch: int = 16, classes: int = 1000,
                 norm: str = "batch", spelling: str = "where", idle: float = 0.75) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, channels))
        self.positions = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, channels))
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [Attention(channels, heads), RePaFFN(channels, 4 * channels, idle, norm, spelling)]
        self.blocks, self.norm, self.head = nn.Sequential(*layers), nn.LayerNorm(channels, eps=1e-6), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        y: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return y


def convnext_t() -> nn.Module:
    return ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768))


def convnext_atto() -> nn.Module:
    return ConvNeXt((2, 2, 6, 2), (40, 80, 160, 320))


def convnext_tiny() -> nn.Module:
    """Not the published "tiny": two stages of one block."""
    return ConvNeXt((1, 1), (8, 16), 10)


def vit_small() -> nn.Module:
    """ViT-S without idle channels: LayerNorm, all hidden channels active."""
    return ViT(384, 12, 6, norm="layer", idle=0.0)


def vit_large() -> nn.Module:
    return ViT(1024, 24, 16, norm="layer", idle=0.0)


def vit_tiny() -> nn.Module:
    return ViT(32, 2, 4, 32, 8, 10, norm="layer", idle=0.0)


def repa_vit_small(spelling: str = "where") -> nn.Module:
    return ViT(384, 12, 6, spelling=spelling)


def repa_vit_large(spelling: str = "where") -> nn.Module:
    return ViT(1024, 24, 16, spelling=spelling)


def repa_vit_tiny(norm: str = "batch", spelling: str = "where") -> nn.Module:
    """Two blocks on images of 32x32."""
    return ViT(32, 2, 4, 32, 8, 10, norm, spelling)
