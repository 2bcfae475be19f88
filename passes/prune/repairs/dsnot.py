"""DSnoT: prune and regrow, no weight changes (Dynamic Sparse No Training, arXiv:2310.08915)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.prune.repairs._base import Cut, Repaired
from sparsify_compiler.passes.prune.structures.fan_in import FanIn
from sparsify_compiler.passes.prune.structures.nm import NM
from sparsify_compiler.passes.prune.structures.unstructured import Unstructured

STATISTICS: tuple[str, ...] = ("patch_mean", "patch_norm", "patch_rows")
CHOOSES = False


def dsnot(cut: Cut, *, cycles: int = 50, threshold: float = 5e-5, power: float = 1.0) -> Repaired:
    """In every row, bring a weight back that makes up for the row's mean error, and cut one that matters little and whose loss does the same.

    Brought back: largest contribution to the mean output, with the sign of the error, over variance^power of its input. Cut in its place: with the
    opposite sign, smallest |w| * norm of its input; of n:m, the smallest of the group. A row stops when its error is below the threshold.
    The variance is that of all tokens; the authors' code takes the mean over the batches of the variance within each.

    cycles     exchanges a row, at most
    threshold  mean error of an output below which a row is left alone. The authors' 0.1 is of the sum over a sequence: of 2048 tokens, 5e-5

    Raises StructureError for a structure in which one weight cannot take another's place.
    """
    if not isinstance(cut.structure, Unstructured | FanIn | NM):
        raise StructureError("one weight cannot take another's place in this structure", where=str(cut.structure),
                             hint="dsnot mends unstructured, row, fan_in and n:m masks")
    mean, norm, rows = (cut.statistics[name].to(cut.weight) for name in STATISTICS)
    variance = (norm.square() / rows - mean.square()).clamp(min=torch.finfo(norm.dtype).tiny)
    given = cut.weight * mean  # what each weight gives to its output, on average
    mask = cut.given_mask().clone()
    wanted = torch.where(mask, 0, given) / variance**power
    exchange = _Exchange(cut.weight.abs() * norm, given, mask, wanted.argsort(dim=1, stable=True))
    move = exchange.within_group if isinstance(cut.structure, NM) else exchange.within_row
    error = torch.where(mask, 0, given).sum(1)
    active, first_sign = torch.ones_like(error, dtype=torch.bool), error.sign()
    period = cut.structure.m if isinstance(cut.structure, NM) else 0
    for _ in range(cycles):
        back, gone = move(error, period)
        lost, won = given.gather(1, gone).squeeze(1), given.gather(1, back).squeeze(1)
        change = lost - won
        helps = (won * error > 0) & ~mask.gather(1, back).squeeze(1) & mask.gather(1, gone).squeeze(1)
        active = active & helps & (error.abs() > threshold) & ((lost * error <= 0) | (period > 0))
        if period:
            active = active & ((error + change).sign() == first_sign)
        if not bool(active.any()):
            break
        _set(mask, gone, active, False)
        _set(mask, back, active, True)
        error = torch.where(active, error + change, error)
    return Repaired(cut.weight * mask, mask)


def _set(mask: Tensor, places: Tensor, rows: Tensor, value: bool) -> None:
    mask.scatter_(1, places, torch.where(rows[:, None], value, mask.gather(1, places)))


class _Exchange:
    """Which weights come and go next, row by row: two ends of sorted lists, and how far each has been used up."""

    def __init__(self, score: Tensor, given: Tensor, mask: Tensor, by_wanted: Tensor) -> None:
        rows, columns = score.shape
        self._by_wanted = by_wanted  # smallest (most negative) contribution of a cut weight first; those that are kept lie in the middle
        self._back = score.new_zeros(rows, 2, dtype=torch.long)
        self._back[:, 1] = columns - 1
        self._score = torch.where(mask, score, torch.inf)
        order = self._score.argsort(dim=1, stable=True)
        sign = given.gather(1, order).sign() * mask.gather(1, order)
        self._negative, self._positive = ((sign != wanted).to(torch.int8).argsort(dim=1, stable=True) for wanted in (-1, 1))
        self._order = order
        self._gone = torch.zeros_like(self._back)

    def within_row(self, error: Tensor, period: int) -> tuple[Tensor, Tensor]:
        """(what comes back [rows, 1], what goes [rows, 1])."""
        back = self._next_back(error)
        falling = (error < 0)[:, None]
        turn = falling.long()
        step = self._gone.gather(1, turn).clamp(max=self._order.shape[1] - 1)
        place = torch.where(falling, self._positive.gather(1, step), self._negative.gather(1, step))
        self._gone.scatter_add_(1, turn, torch.ones_like(turn))
        return back, self._order.gather(1, place)

    def within_group(self, error: Tensor, period: int) -> tuple[Tensor, Tensor]:
        """The same; what goes is the weakest of the group of `period` that the other comes back to."""
        back = self._next_back(error)
        group = back - back % period + torch.arange(period, device=back.device)
        gone = group.gather(1, self._score.gather(1, group).argmin(1, keepdim=True))
        self._score.scatter_(1, gone, torch.finfo(self._score.dtype).max)  # one that went is the last to go again
        return back, gone

    def _next_back(self, error: Tensor) -> Tensor:
        end = (error > 0).long()[:, None]
        place = self._back.gather(1, end).clamp(0, self._by_wanted.shape[1] - 1)  # used up: what is there now does not help any more
        self._back.scatter_add_(1, end, 1 - 2 * end)
        return self._by_wanted.gather(1, place)
