"""Parallel convs of one input become one conv, whose kernel is the sum of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from sparsify_compiler.passes_api import Miss
from sparsify_compiler.rule import Match, Rule, RulePass


@dataclass(frozen=True)
class MergeConvBranches(RulePass):
    """Merge parallel convs whose smaller kernel, in a frame of zeros, lies over the larger one.

    Matches    conv2d(x, w, b, stride, padding=p) + conv2d(x, v, c, stride, padding=q), with p - q = (size(w) - size(v)) / 2 on both axes
    Rewrites   conv2d(x, w + pad(v, p - q), b + c, stride, padding=p)
    Preserves  values, up to float reassociation
    Paper      Ding et al., RepVGG: Making VGG-style ConvNets Great Again, arXiv:2101.03697, section 3.3
    """

    def rules(self) -> Sequence[Rule]:
        return (MergeTwo(),)


class MergeTwo(Rule):
    """The larger kernel is (w, b), the smaller (v, c); dilation is 1, groups and stride are the same."""

    params = ("w", "b", "v", "c")

    @staticmethod
    def pattern(x: Any, w: Any, b: Any, v: Any, c: Any, stride: Any, p: Any, q: Any, groups: Any) -> Any:
        return conv2d(x, w, b, stride, p, 1, groups) + conv2d(x, v, c, stride, q, 1, groups)

    def check(self, m: Match) -> Miss | None:
        large, small = tuple(m.w.shape[2:]), tuple(m.v.shape[2:])
        if isinstance(m.p, str) or isinstance(m.q, str):
            return Miss(f"padding by name ({m.p}, {m.q}) is not merged")
        if not all(a >= b for a, b in zip(large, small, strict=True)):
            return Miss(f"a {_x(small)} kernel does not lie inside {_x(large)}")
        if not all(a - b == 2 * (i - j) for a, b, i, j in zip(large, small, m.p, m.q, strict=True)):
            return Miss(f"{_x(small)} with padding {m.q} is not centred in {_x(large)} with padding {m.p}")
        return None

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor | None, v: Tensor, c: Tensor | None, stride: Any, p: Any, q: Any, groups: int) -> Tensor:
        rows, columns = p[0] - q[0], p[1] - q[1]
        bias = b if c is None else c if b is None else b + c
        return conv2d(x, w + pad(v, (columns, columns, rows, rows)), bias, stride, p, 1, groups)


def _x(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


class _Block(nn.Module):
    """A RepVGG block as it is trained, without its norms."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.small = nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.small(x) + self.large(x))


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A 3x3 conv beside a 1x1 conv."""
    torch.manual_seed(0)
    return _Block().eval(), (torch.randn(2, 4, 8, 8),)
