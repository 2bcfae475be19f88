"""Experts that cost nothing beside the FFNs of a mixture: their columns among the scores, their rows of the choice, and what they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.named import Named
from sparsify_compiler.passes.moe._evidence import Evidence, Formula


@dataclass(frozen=True)
class Free:
    """`experts` FFNs and, behind them in the router's order, those of `outputs`: formulas of x, None for one that gives nothing."""

    experts: int
    outputs: Sequence[Formula | None]
    columns: Formula

    @staticmethod
    def of(names: Sequence[str], evidence: Evidence, scores: Tensor, share: float) -> Free:
        """By their names. scores float32 [R, E] of the FFNs on rows of calibration, of which `share` are chosen.

        To begin with a free expert scores in every row what the last chosen FFN scores on average: rows whose scores fall off earlier take it.
        """
        experts = scores.shape[1]
        last = float(scores.topk(min(max(1, round(share * experts)), experts), -1).values[:, -1].mean())
        offset = torch.full((len(names),), last, dtype=torch.float32)
        tensors = {"free_weight": torch.zeros(len(names), evidence.ffn.gate.shape[1], dtype=torch.float32), "free_offset": offset}
        return Free(experts, [Named.parse("free expert", name)(evidence) for name in names], Formula(tensors, with_columns))

    def kept(self) -> Formula:
        """Of a choice: the same, -1 for experts that give nothing."""
        return Formula({}, partial(_without, nothing=tuple(self.experts + at for at, made in enumerate(self.outputs) if made is None)))

    def routed(self) -> Formula:
        """Of a choice: the same, -1 for all experts that are no FFN."""
        return Formula({}, partial(ffns_of, experts=self.experts))


def with_columns(scores: Tensor, x: Tensor, free_weight: Tensor, free_offset: Tensor) -> Tensor:
    """[..., E] -> [..., E + F]."""
    return torch.cat([scores, linear(x, free_weight, free_offset).float()], -1)


def with_residual(scores: Tensor, before: Tensor, residual: Tensor) -> Tensor:
    """Scores and a linear map of those of the mixture before (MoE++, arXiv:2410.07348)."""
    found: Tensor = scores + linear(before, residual)
    return found


def ffns_of(chosen: Tensor, experts: int) -> Tensor:
    """A choice with -1 for what lies behind the FFNs."""
    return torch.where(chosen < experts, chosen, -1)


def _without(chosen: Tensor, nothing: Sequence[int]) -> Tensor:
    for expert in nothing:
        chosen = torch.where(chosen == expert, -1, chosen)
    return chosen


def given_by(y: Tensor, chosen: Tensor, weights: Tensor | None = None, *, expert: int) -> Tensor:
    """What one free expert adds: its output [..., N] times its weight in the rows that chose it, 0 elsewhere."""
    named = (chosen == expert).to(y.dtype)
    return y * (named if weights is None else named * weights.to(y.dtype)).sum(-1, keepdim=True)
