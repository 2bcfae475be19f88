"""Parallel convs of one input become one conv, whose kernel is the sum of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from sparsify_compiler.passes.reparam._branches import Conv, Identity, MergeBranches, Normed
from sparsify_compiler.passes.reparam._norms import batch_statistics, norm, scale_and_shift
from sparsify_compiler.passes_api import Miss
from sparsify_compiler.pattern import op_name
from sparsify_compiler.rule import Match, Rule, RulePass


@dataclass(frozen=True)
class MergeConvBranches(RulePass):
    """Merge parallel convs of any kernel sizes, paddings, dilations and groups, and the norm or the plain x beside a conv.

    Matches    conv(x, w, b, stride, p, d, groups) + conv(x, v, c, stride, q, e, groups), in 1 to 3 dimensions; their difference; a foreign
               addend between them; with batch_norm(x, mean, var, g, beta, eps), x (both at stride 1) or 0 in place of one conv
    Rewrites   conv(x, W, b + c, stride): W is the sum of the kernels, each tap at its place in the frame of zeros that holds the taps of both,
               where x stands for v = eye, c = 0, and the norm for v = diag(g / sqrt(var + eps)), c = beta - mean * g / sqrt(var + eps)
    Preserves  values, up to float reassociation
    Paper      Ding et al., RepVGG: Making VGG-style ConvNets Great Again, arXiv:2101.03697, section 3.3; frames of unequal kernels: ACNet,
               arXiv:1908.03930, and RepLKNet, arXiv:2203.06717; several convs of one size: MobileOne, arXiv:2206.04040; dilated branches:
               UniRepLKNet, arXiv:2311.15599
    """

    about: ClassVar[frozenset[str]] = frozenset({"conv1d", "conv2d", "conv3d", "batch_norm"})

    def rules(self) -> Sequence[Rule]:
        found: list[Rule] = []
        for rank in (2, 1, 3):
            conv, normed, identity = Conv(rank), Normed(Identity(rank)), Identity(rank)
            found += [MergeBranches(conv, other, sign) for other in (conv, normed, identity) for sign in (1, -1)]
            found += [MergeBranches(other, conv, -1) for other in (normed, identity)]
        return [*found, MergeNorms(), DropZero()]


class DropZero(Rule):
    """A branch plus 0: in published code, where the identity branch would be."""

    @staticmethod
    def pattern(branch: Any) -> Any:
        return branch + 0

    def check(self, m: Match) -> Miss | None:
        node, kept = m.node("branch"), m.output.meta["val"]
        known = node is not None and op_name(node) in MergeConvBranches.about and m.branch.dtype == kept.dtype
        return None if known else Miss("0 is added to what is no conv or norm")

    @staticmethod
    def rewrite(branch: Tensor) -> Tensor:
        return branch


class MergeNorms(Rule):
    """Two norms of one value, both with stored statistics: one norm, with the statistics of the first."""

    params = ("mean", "var", "g", "beta", "mean2", "var2", "g2", "beta2")

    @staticmethod
    def pattern(x: Any, mean: Any, var: Any, g: Any, beta: Any, eps: Any, training: Any,
                mean2: Any, var2: Any, g2: Any, beta2: Any, eps2: Any, training2: Any) -> Any:
        return norm(x, mean, var, g, beta, eps, training) + norm(x, mean2, var2, g2, beta2, eps2, training2)

    def check(self, m: Match) -> Miss | None:
        return batch_statistics(m.mean, m.var, m.training) or batch_statistics(m.mean2, m.var2, m.training2)

    @staticmethod
    def rewrite(x: Tensor, mean: Tensor, var: Tensor, g: Tensor | None, beta: Tensor | None, eps: float,
                mean2: Tensor, var2: Tensor, g2: Tensor | None, beta2: Tensor | None, eps2: float) -> Tensor:
        (s, t), (s2, t2) = scale_and_shift(mean, var, g, beta, eps), scale_and_shift(mean2, var2, g2, beta2, eps2)
        both = s + s2
        return batch_norm(x, mean, var, both * torch.sqrt(var + eps), t + t2 + mean * both, eps=eps)


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
