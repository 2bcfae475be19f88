"""MobileOne: An Improved One Millisecond Mobile Backbone, arXiv:2206.04040. S0 has 5.3 M parameters as trained and 2.1 M deployed."""

from __future__ import annotations

from torch import Tensor, nn

from models.fusing import ConvBN, Kernel, framed, identity_norm, like, summed


class MobileOneBlock(nn.Module):
    """`branches` parallel convs of one size, a 1x1 conv beside those that are larger, and a norm of the input where it fits: all are summed.

    FastViT builds its stem, its patch embeddings and the two halves of its RepMixer of the same block.
    """

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, branches: int = 1, scale: bool = True,
                 act: nn.Module | None = None, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.channels, self.size, self.groups = inputs, size, groups
        self.skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.scale = ConvBN(inputs, outputs, 1, stride, groups=groups) if scale and size > 1 else None
        self.convs = nn.ModuleList(ConvBN(inputs, outputs, size, stride, groups=groups) for _ in range(branches))
        self.gate, self.act = gate or nn.Identity(), act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        aside = [branch(x) for branch in (self.scale, self.skip) if branch is not None]
        out = sum(aside)  # starts from a plain 0, as the published code does
        for conv in self.convs:
            out = out + conv(x)
        y: Tensor = self.act(self.gate(out))
        return y

    def kernel(self) -> Kernel:
        branches = [conv.kernel() for conv in self.convs]
        if self.scale is not None:
            branches.append(framed(self.scale.kernel(), self.size))
        if self.skip is not None:
            branches.append(identity_norm(self.skip, self.channels, self.groups, self.size))
        return summed(branches)

    def by_hand(self) -> nn.Module:
        conv = like(self.convs[0][0], self.kernel())  # type: ignore[index]
        rest = [part for part in (self.gate, self.act) if not isinstance(part, nn.Identity)]
        return nn.Sequential(conv, *rest) if rest else conv


class MobileOne(nn.Module):
    """A stem, then stages of depthwise 3x3 and pointwise blocks, each with a ReLU; mean over the image; classifier."""

    def __init__(self, blocks: tuple[int, ...], widths: tuple[int, ...], stem: int, branches: int, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [MobileOneBlock(3, stem, 3, 2, act=nn.ReLU())]
        last = stem
        for count, width in zip(blocks, widths, strict=True):
            for i in range(count):
                layers.append(MobileOneBlock(last, last, 3, 2 if i == 0 else 1, groups=last, branches=branches, act=nn.ReLU()))
                layers.append(MobileOneBlock(last, width, 1, branches=branches, act=nn.ReLU()))
                last = width
        self.blocks = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.pool(self.blocks(x)).flatten(1))
        return y


def mobileone_s0() -> nn.Module:
    return MobileOne((2, 8, 10, 1), (48, 128, 256, 1024), 48, 4)


def mobileone_tiny() -> nn.Module:
    """Two stages of the same structure."""
    return MobileOne((1, 2), (12, 16), 8, 4, 10)
