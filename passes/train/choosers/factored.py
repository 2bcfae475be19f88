"""Factored: scores of few numbers, low-rank and by rows and columns, beside the weight's magnitude (PST, arXiv:2205.11005)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsify_compiler.errors import InputError
from sparsify_compiler.passes.train._moving import cut
from sparsify_compiler.passes.train.choosers._base import Choice, Chooser


@dataclass(frozen=True, kw_only=True)
class Factored(Chooser):
    """|W| + low * A B + lines * (R + C) ranks the weights of a layer; gradients pass straight through the choice, to W too.

    rank   of A [out, rank] and B [rank, in]
    low    weight of their product
    lines  of R [out, 1] and C [1, in]

    The scores are one vector: A, B, R and C one after the other. All but A start at 0.
    """

    rank: int = 8
    low: float = 1.0
    lines: float = 1.0

    of_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"a rank is 1 or more, got {self.rank}", where="chooser factored")

    @property
    def thins(self) -> bool:
        return True

    def start(self, mask: Tensor, choice: Choice) -> Tensor:
        outputs, inputs = len(mask), math.prod(mask.shape[1:])
        drawn = torch.randn(outputs * self.rank, generator=choice.noise(torch.device("cpu")), dtype=torch.float32)
        return torch.cat([drawn, torch.zeros(self.rank * inputs + outputs + inputs, dtype=torch.float32)])

    def soft(self, scores: Tensor, mask: Tensor, choice: Choice) -> Tensor:
        ranking = self._ranking(scores, mask, choice)
        return mask.float() + (ranking - ranking.detach())

    def mask(self, scores: Tensor, mask: Tensor, choice: Choice) -> Tensor:
        return cut(choice.structure, self._ranking(scores, mask, choice), choice.density)

    def _ranking(self, scores: Tensor, mask: Tensor, choice: Choice) -> Tensor:
        """float32 of the mask's shape."""
        assert choice.weight is not None
        outputs, inputs = len(mask), math.prod(mask.shape[1:])
        a, b, rows, columns = torch.split(scores, [outputs * self.rank, self.rank * inputs, outputs, inputs])
        with torch.autocast(scores.device.type, enabled=False):  # a user's autocast would round what is compared
            low = a.view(outputs, self.rank) @ b.view(self.rank, inputs)
        learnt = self.low * low + self.lines * (rows[:, None] + columns[None])
        ranking: Tensor = choice.weight.float().abs() + learnt.view(mask.shape)
        return ranking
