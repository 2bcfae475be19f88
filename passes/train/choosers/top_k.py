"""Top k: a score for every weight, the highest are kept, and gradients pass straight through (Lottery Jackpots, arXiv:2104.08700)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.passes.train._moving import cut
from sparsify_compiler.passes.train.choosers._base import Choice, Chooser

HALVINGS = 12  # of the range in which the lead lies


@dataclass(frozen=True, kw_only=True)
class TopK(Chooser):
    """A score is moved by the gradient of the loss by its weight's place in the mask, whether the weight is kept or not.

    gap    how far weights that are not kept start below those that are, whose scores are 1
    power  of what is left of the learning: at most that share of the weights that ought to come in does, those that are furthest ahead;
           0 lets all in (the paper's short restriction, whose share falls to 0 likewise)
    """

    gap: float = 0.01
    power: float = 4.0

    @property
    def thins(self) -> bool:
        return self.power == 0

    def start(self, mask: Tensor, choice: Choice) -> Tensor:
        return 1 - self.gap * (~mask).float()

    def soft(self, scores: Tensor, mask: Tensor, choice: Choice) -> Tensor:
        return mask.float() + (scores - scores.detach())

    def mask(self, scores: Tensor, mask: Tensor, choice: Choice) -> Tensor:
        wanted = cut(choice.structure, scores, choice.density)
        most = int((wanted & ~mask).sum()) * (1 - choice.progress) ** self.power if self.power else float("inf")
        return wanted if self.power == 0 else led(scores, mask, wanted, choice, most)


def led(scores: Tensor, mask: Tensor, wanted: Tensor, choice: Choice, most: float) -> Tensor:
    """The mask of scores of which those that are kept have such a lead that at most `most` weights come in, and nearly as many do."""
    low, high, best = 0.0, float(scores.max() - scores.min()), mask
    if int((wanted & ~mask).sum()) <= most:
        return wanted
    for _ in range(HALVINGS if most >= 1 else 0):
        lead = (low + high) / 2
        found = cut(choice.structure, torch.where(mask, scores + lead, scores), choice.density)
        if int((found & ~mask).sum()) <= most:
            high, best = lead, found
        else:
            low = lead
    return best
