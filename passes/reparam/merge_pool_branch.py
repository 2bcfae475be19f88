"""An average pool beside a conv is a conv itself, and is added to its kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, avg_pool2d, avg_pool3d

from sparsify_compiler.passes.reparam._branches import Branch, Conv, Identity, MergeBranches, Normed
from sparsify_compiler.passes.reparam._frames import Frame, Kernel, behind, border, composed, frame_of
from sparsify_compiler.passes_api import Miss
from sparsify_compiler.rule import Rule, RulePass

_POOLS: Mapping[int, Callable[..., Any]] = {1: avg_pool1d, 2: avg_pool2d, 3: avg_pool3d}


@dataclass(frozen=True)
class MergePoolBranch(RulePass):
    """Merge an average pool, alone or behind a conv, with or without a norm, into the conv beside it.

    Matches    conv(x, w, b, stride, p) + P, a foreign addend between them too, where P is avg_pool(x, k, stride, q), its norm,
               avg_pool(conv(x, v, c, padding=r), k, stride), or its norm; after fold_batchnorm the inner conv has no norm of its own
    Rewrites   conv(x, W, b + c, stride): W is the sum of w and the pool's kernel, 1 / (k * k) on the diagonal of channels, or
               v / (k * k) at each tap; a norm scales the latter and shifts c
    Preserves  values, up to float reassociation
    Paper      Ding et al., Diverse Branch Block: Building a Convolution as an Inception-like Unit, arXiv:2103.13425, transforms III and V
    """

    about: ClassVar[frozenset[str]] = frozenset({"avg_pool1d", "avg_pool2d", "avg_pool3d"})

    def rules(self) -> Sequence[Rule]:
        found: list[Rule] = []
        for rank in (2, 1, 3):
            pools = Pool(Identity(rank)), Pool(Conv(rank))
            found += [MergeBranches(Conv(rank), other) for pool in pools for other in (pool, Normed(pool))]
        return found


class Pool(Branch):
    """An average pool behind a conv, or behind x itself: there it is a depthwise conv, 1 / size at each tap."""

    def __init__(self, inner: Branch) -> None:
        super().__init__(inner.rank)
        own = ("size", "step", "border", "ceil", "counts", *(("divisor",) if inner.rank > 1 else ()))
        self.inner, self.names = inner, (*inner.names, *own)

    def write(self, x: Any, a: Any) -> Any:
        divisor = (a.divisor,) if self.rank > 1 else ()
        return _POOLS[self.rank](self.inner.write(x, a), a.size, a.step, a.border, a.ceil, a.counts, *divisor)

    def refuse(self, x: Any, a: Any) -> Miss | None:
        if a.ceil:
            return Miss(f"the pool of {a.size} rounds its size up (ceil_mode): its last windows are not whole")
        if not a.counts and any(a.border):
            return Miss(f"the pool does not count its padding of {a.border}: at the border it divides by less than {math.prod(a.size)}")
        why = border(self.inner.frame(a), getattr(a, "b", None) is not None, self._own(a))
        return Miss(f"of a conv and a pool, {why}") if why else self.inner.refuse(x, a)

    def frame(self, a: Any) -> Frame:
        return behind(self.inner.frame(a), self._own(a))

    def kernel(self, x: Tensor, a: Any) -> Kernel:
        inner = self.inner.kernel(x, a)
        channels, share = inner.weight.shape[0], 1 / (getattr(a, "divisor", None) or math.prod(a.size))
        pool = torch.full([channels, 1, *a.size], share, dtype=inner.weight.dtype, device=inner.weight.device)
        return composed(inner, Kernel(pool, None, self._own(a), channels))

    def _own(self, a: Any) -> Frame:
        return frame_of(a.size, a.step or a.size, a.border, (1,) * self.rank)


class _Block(nn.Module):
    """DBB's 3x3 conv, its average pool and its 1x1 conv with an average pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.pool, self.norm = nn.AvgPool2d(3, 2, 1), nn.BatchNorm2d(4)
        self.behind = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.AvgPool2d(3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + self.norm(self.pool(x)) + self.behind(x))


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A 3x3 conv beside an average pool with its norm and beside a 1x1 conv with an average pool."""
    torch.manual_seed(0)
    return _Block().eval(), (torch.randn(2, 4, 8, 8),)
