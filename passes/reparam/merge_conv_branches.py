"""Parallel convs of one input become one conv, whose kernel is the sum of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, pad

from sparsify_compiler.passes.reparam.fold_batchnorm import scale_and_shift
from sparsify_compiler.passes_api import Miss
from sparsify_compiler.rule import Match, Rule, RulePass


@dataclass(frozen=True)
class MergeConvBranches(RulePass):
    """Merge parallel convs whose smaller kernel, in a frame of zeros, lies over the larger one; a norm beside a conv is a 1x1 conv.

    Matches    conv2d(x, w, b, stride, padding=p) + conv2d(x, v, c, stride, padding=q), with p - q = (size(w) - size(v)) / 2 on both axes,
               or conv2d(x, w, b, padding=p) + batch_norm(x, mean, var, g, beta, eps), with p = (size(w) - 1) / 2
    Rewrites   conv2d(x, w + pad(v, p - q), b + c, stride, padding=p),
               where the norm stands for v = diag(g / sqrt(var + eps)), c = beta - mean * g / sqrt(var + eps), q = 0
    Preserves  values, up to float reassociation
    Paper      Ding et al., RepVGG: Making VGG-style ConvNets Great Again, arXiv:2101.03697, section 3.3
    """

    about: ClassVar[frozenset[str]] = frozenset({"conv2d"})

    def rules(self) -> Sequence[Rule]:
        return MergeTwo(), MergeNorm()


class MergeTwo(Rule):
    """The larger kernel is (w, b), the smaller (v, c); dilation is 1, groups and stride are the same."""

    params = ("w", "b", "v", "c")

    @staticmethod
    def pattern(x: Any, w: Any, b: Any, v: Any, c: Any, stride: Any, p: Any, q: Any, groups: Any) -> Any:
        return conv2d(x, w, b, stride, p, 1, groups) + conv2d(x, v, c, stride, q, 1, groups)

    def check(self, m: Match) -> Miss | None:
        return _lies_over(tuple(m.w.shape[2:]), m.p, tuple(m.v.shape[2:]), m.q)

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor | None, v: Tensor, c: Tensor | None, stride: Any, p: Any, q: Any, groups: int) -> Tensor:
        bias = b if c is None else c if b is None else b + c
        return conv2d(x, w + _framed(v, p[0] - q[0], p[1] - q[1]), bias, stride, p, 1, groups)


class MergeNorm(Rule):
    """RepVGG's identity branch: a norm is a conv whose 1x1 kernel is diagonal."""

    params = ("w", "b", "mean", "var", "g", "beta")

    @staticmethod
    def pattern(x: Any, w: Any, b: Any, p: Any, groups: Any, mean: Any, var: Any, g: Any, beta: Any, eps: Any) -> Any:
        return conv2d(x, w, b, 1, p, 1, groups) + batch_norm(x, mean, var, g, beta, eps=eps)

    def check(self, m: Match) -> Miss | None:
        if m.mean is None or m.var is None:
            return Miss("the norm has no running statistics: it uses those of the batch")
        return _lies_over(tuple(m.w.shape[2:]), m.p, (1, 1), (0, 0))

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor | None, p: Any, groups: int,
                mean: Tensor, var: Tensor, g: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
        s, t = scale_and_shift(mean, var, g, beta, eps)
        eye = torch.eye(w.shape[1], dtype=w.dtype, device=w.device).repeat(groups, 1)  # each group's own part of the diagonal
        v = (eye * s[:, None])[:, :, None, None]
        return conv2d(x, w + _framed(v, *p), t if b is None else b + t, 1, p, 1, groups)


def _framed(v: Tensor, rows: int, columns: int) -> Tensor:
    return pad(v, (columns, columns, rows, rows))


def _lies_over(large: tuple[int, ...], p: Any, small: tuple[int, ...], q: Any) -> Miss | None:
    """None when the small kernel, centred in the large one, meets the same pixels at the same place."""
    if isinstance(p, str) or isinstance(q, str):
        return Miss(f"padding by name ({p}, {q}) is not merged")
    if not all(a >= b for a, b in zip(large, small, strict=True)):
        return Miss(f"a {_x(small)} kernel does not lie inside {_x(large)}")
    if not all(a - b == 2 * (i - j) for a, b, i, j in zip(large, small, p, q, strict=True)):
        return Miss(f"{_x(small)} with padding {q} is not centred in {_x(large)} with padding {p}")
    return None


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
