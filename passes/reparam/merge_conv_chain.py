"""Two convs in a row, with nothing between them, become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsify_compiler.passes.reparam._branches import CONVS, conv, same_size, second_mask
from sparsify_compiler.passes.reparam._frames import Kernel, behind, border, composed, frame_of, placed, size_of, spelled
from sparsify_compiler.passes_api import Miss
from sparsify_compiler.rule import Match, Rule, RulePass


@dataclass(frozen=True)
class MergeConvChain(RulePass):
    """Merge a conv into the conv behind it, where zeros padded between them change nothing and one conv costs less than two.

    Matches    conv(conv(x, w, b, s, p, d, groups), v, c, t, q, e, groups), in 1 to 3 dimensions, with q = 0, or b = None and w seeing
               nothing but zeros beyond its border (a 1x1 kernel, or p >= d * (size(w) - 1))
    Rewrites   conv(x, W, c + sum(v * b), s * t, s * q + p), where W at tap s * e * j + d * i is the sum of v[j] @ w[i]
    Preserves  values, up to float reassociation
    Paper      Ding et al., Diverse Branch Block: Building a Convolution as an Inception-like Unit, arXiv:2103.13425, transform III
    """

    about: ClassVar[frozenset[str]] = frozenset({"conv1d", "conv2d", "conv3d"})

    def rules(self) -> Sequence[Rule]:
        return [ConvThenConv(rank) for rank in (2, 1, 3)]


class ConvThenConv(Rule):
    """(w, b) comes first, (v, c) behind it. A low-rank chain or a depthwise and a pointwise conv cost less as two, and stay."""

    params = ("w", "b", "v", "c")
    only_if_cheaper = True

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def pattern(self, x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
                v: Any, c: Any, stride2: Any, padding2: Any, dilation2: Any, groups2: Any) -> Any:
        inner = CONVS[self.rank](x, w, b, stride, padding, dilation, groups)
        return CONVS[self.rank](inner, v, c, stride2, padding2, dilation2, groups2)

    def check(self, m: Match) -> Miss | None:
        one, two = frame_of(m.w.shape[2:], m.stride, m.padding, m.dilation), frame_of(m.v.shape[2:], m.stride2, m.padding2, m.dilation2)
        why = border(one, m.b is not None, two)
        if why is not None:
            return Miss(f"of two convs, {size_of(one)} then {size_of(two)}, {why}")
        return second_mask(m) or same_size(m, self.rank, *spelled(behind(one, two)))

    def rewrite(self, x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int,
                v: Tensor, c: Tensor | None, stride2: Any, padding2: Any, dilation2: Any, groups2: int) -> Tensor:
        one = Kernel(w, b, frame_of(w.shape[2:], stride, padding, dilation), groups)
        both = composed(one, Kernel(v, c, frame_of(v.shape[2:], stride2, padding2, dilation2), groups2))
        frame, padded = spelled(both.frame)
        return conv(self.rank, x, placed(both, frame, both.groups), both.bias, frame, padded, both.groups)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """DBB's 1x1 then 3x3, and a 3x3 then 1x1 that widens."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(4, 16, 1, bias=False), nn.Conv2d(16, 4, 3, padding=1))
    return nn.Sequential(*wide, nn.ReLU(), nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 1)).eval(), (torch.randn(2, 4, 8, 8),)
