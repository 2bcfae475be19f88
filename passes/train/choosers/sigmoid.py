"""Sigmoid: scores open and shut along a curve that becomes a step (the unified mask of PAT, arXiv:2408.14721)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.errors import InputError
from sparsify_compiler.passes.train._moving import cut
from sparsify_compiler.passes.train.choosers._base import Choice, Chooser


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Chooser):
    """In training everything counts by sigmoid(steepness * (score - limit)) + lift, the limit between the last score that is kept and the next.

    PAT asks for the number that is kept by a term of the loss; here the limit moves, and the number is met in every step.

    steepness  at first and at last, in between along a geometric line
    gap        how far apart the scores of what is kept, and is not, start
    lift       what is added to all at first, so that they start near 1; it falls in a line to 0 at the half
    """

    steepness: tuple[float, ...] = (1.0, 100.0)
    gap: float = 0.1
    lift: float = 0.5

    def __post_init__(self) -> None:
        if len(self.steepness) != 2 or min(self.steepness) <= 0:
            raise InputError(f"steepness is two numbers above 0, at first and at last, got {self.steepness}", where="chooser sigmoid")

    @property
    def thins(self) -> bool:
        return True

    def start(self, mask: Tensor, choice: Choice) -> Tensor:
        return self.gap * (mask.float() - 0.5)

    def soft(self, scores: Tensor, mask: Tensor, choice: Choice) -> Tensor:
        first, last = self.steepness
        steep = first * (last / first) ** choice.progress
        opened: Tensor = ((scores - self._limit(scores.detach(), mask)) * steep).sigmoid() + self.lift * max(1 - 2 * choice.progress, 0.0)
        return opened

    def mask(self, scores: Tensor, mask: Tensor, choice: Choice) -> Tensor:
        return cut(choice.structure, scores, choice.density)

    def _limit(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Half-way between the lowest score that is kept and the highest that is not; where all are kept, or none, as far off as it is at first."""
        if bool(mask.all()):
            return scores.min() - self.gap / 2
        if not bool(mask.any()):
            return scores.max() + self.gap / 2
        return (torch.where(mask, scores, torch.inf).min() + torch.where(mask, -torch.inf, scores).max()) / 2
