"""RepVGG: Making VGG-style ConvNets Great Again, arXiv:2101.03697. A0 has 9.11 M parameters as trained and 8.31 M deployed."""

from __future__ import annotations

from torch import Tensor, nn

from models.fusing import ConvBN, framed, identity_norm, like, summed


class RepVGGBlock(nn.Module):
    """3x3, 1x1 and, where input and output agree, identity, each with its norm, summed before the ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.dense = ConvBN(inputs, outputs, 3, stride)
        self.pointwise = ConvBN(inputs, outputs, 1, stride)
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        skip = 0 if self.identity is None else self.identity(x)
        y: Tensor = self.act(self.dense(x) + self.pointwise(x) + skip)
        return y

    def by_hand(self) -> nn.Module:
        branches = [self.dense.kernel(), framed(self.pointwise.kernel(), 3)]
        if self.identity is not None:
            branches.append(identity_norm(self.identity, self.identity.num_features, 1, 3))
        return nn.Sequential(like(self.dense[0], summed(branches)), self.act)


class RepVGG(nn.Module):
    """A stem and four stages, each of which begins with stride 2; mean over the image; classifier."""

    def __init__(self, blocks: tuple[int, ...], widths: tuple[int, ...], stem: int, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [RepVGGBlock(3, stem, 2)]
        last = stem
        for count, width in zip(blocks, widths, strict=True):
            layers += [RepVGGBlock(last if i == 0 else width, width, 2 if i == 0 else 1) for i in range(count)]
            last = width
        self.blocks = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.pool(self.blocks(x)).flatten(1))
        return y


def repvgg_a0() -> nn.Module:
    return RepVGG((2, 4, 14, 1), (48, 96, 192, 1280), 48)


def repvgg_tiny() -> nn.Module:
    """Three stages of the same structure, in tens of thousands of parameters."""
    return RepVGG((2, 2, 2), (8, 16, 24), 8, 10)
