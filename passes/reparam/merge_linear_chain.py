"""Linear after linear, with nothing between them, is one linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sparsify_compiler.passes.reparam._weights import tied_in
from sparsify_compiler.passes_api import Miss
from sparsify_compiler.rule import Match, Rule, RulePass


@dataclass(frozen=True)
class MergeLinearChain(RulePass):
    """Merge linears that follow each other, where the product costs no more than its factors: a low-rank pair stays.

    Matches    linear(linear(x, w, b), v, c), where nothing else reads the value between and the weights are not tied
    Rewrites   linear(x, v w, c + v b)
    Preserves  values, up to float reassociation
    Paper      Guo et al., ExpandNets: Linear Over-parameterization to Train Compact Convolutional Networks, arXiv:1811.10495, section 3
    """

    about: ClassVar[frozenset[str]] = frozenset({"linear"})

    def rules(self) -> Sequence[Rule]:
        return (MergeTwoLinears(),)


class MergeTwoLinears(Rule):
    """Two at a time; a longer chain by repetition."""

    params = ("w", "b", "v", "c")
    only_if_cheaper = True

    @staticmethod
    def pattern(x: Any, w: Any, b: Any, v: Any, c: Any) -> Any:
        return linear(linear(x, w, b), v, c)

    def check(self, m: Match) -> Miss | None:
        return tied_in(m, "w", "v")

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor | None, v: Tensor, c: Tensor | None) -> Tensor:
        return linear(x, v @ w, after(b, v, c))


def after(b: Tensor | None, v: Tensor, c: Tensor | None) -> Tensor | None:
    """The bias b as linear(., v, c) hands it on."""
    if b is None:
        return c
    return v @ b if c is None else v @ b + c


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A linear that was widened for training, as ExpandNets does, and a low-rank pair, which stays."""
    torch.manual_seed(0)
    widened = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 6))
    low_rank = nn.Sequential(nn.Linear(6, 1, bias=False), nn.Linear(1, 6))
    return nn.Sequential(widened, nn.ReLU(), low_rank).eval(), (torch.randn(4, 8),)
