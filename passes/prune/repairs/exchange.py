"""Exchange: coordinate descent on the mask alone, the kept weights as they are (iCBS, arXiv:2411.17796, on the error of the layer's output)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.prune.repairs._base import Cut, Repaired
from sparsify_compiler.passes.prune.structures.fan_in import FanIn
from sparsify_compiler.passes.prune.structures.nm import NM
from sparsify_compiler.passes.prune.structures.unstructured import Unstructured

STATISTICS: tuple[str, ...] = ("patch_gram",)
CHOOSES = False
MIN_GAIN = 1e-6  # of a row's error: what float32 can tell


def exchange(cut: Cut, *, exchanges: int = 200) -> Repaired:
    """In every row, bring one weight back and cut another, the pair that lowers ||X w * mask - X w||^2 most, until no such pair is found.

    A pair is found from either side: the weight whose return, or whose loss, does best alone, with the best partner for it by the exact change of
    the error. Of n:m both are of one group. The paper's blocks are solved by annealing and its error is the model's loss; here a block is a row,
    whose error the Gram matrix gives exactly.

    exchanges  of each row, at most

    Raises StructureError for a structure in which one weight of a row cannot take another's place.
    """
    structure = cut.structure
    if not isinstance(structure, Unstructured | FanIn | NM) or (isinstance(structure, NM) and structure.along != "inputs"):
        raise StructureError("one weight of a row cannot take another's place in this structure", where=str(structure),
                             hint="exchange mends unstructured, row, column, fan_in and n:m masks")
    gram = cut.statistics["patch_gram"].to(cut.weight)
    mask = cut.given_mask().clone()
    period = structure.m if isinstance(structure, NM) else 0
    rows = torch.arange(len(mask))
    for _ in range(exchanges):
        if not len(rows):
            break
        gain, back, gone = _best_pair(cut.weight[rows], mask[rows], gram, period)
        helps = gain > 0
        rows, back, gone = rows[helps], back[helps], gone[helps]
        mask[rows, back], mask[rows, gone] = True, False
    return Repaired(cut.weight * mask, mask)


def _best_pair(weight: Tensor, mask: Tensor, gram: Tensor, period: int) -> tuple[Tensor, Tensor, Tensor]:
    """(by how much the error falls, or 0; column that comes back; column that goes), each [rows]."""
    missing = weight.masked_fill(mask, 0)
    pull = missing @ gram
    own = weight.square() * gram.diagonal()
    change = torch.where(mask, 2 * weight * pull + own, own - 2 * weight * pull)  # of the error, when this weight alone turns over
    returns, losses = change.masked_fill(mask, torch.inf), change.masked_fill(~mask, torch.inf)
    one = _partner(returns.argmin(1), losses, change, weight, gram, period)
    other = _partner(losses.argmin(1), returns, change, weight, gram, period)
    first = one[0] <= other[0]
    total = torch.where(first, one[0], other[0])
    back, gone = torch.where(first, one[1], other[2]), torch.where(first, one[2], other[1])
    error = (missing * pull).sum(1)
    return torch.where(total < -MIN_GAIN * error, -total, 0), back, gone


def _partner(chosen: Tensor, candidates: Tensor, change: Tensor, weight: Tensor, gram: Tensor, period: int) -> tuple[Tensor, Tensor, Tensor]:
    """(change of the error of the pair, chosen, its best partner) for each row; the change is infinite where there is none."""
    column = chosen[:, None]
    total = candidates + change.gather(1, column) - 2 * weight * weight.gather(1, column) * gram[chosen]
    if period:
        total = total.masked_fill(torch.arange(total.shape[1]) // period != column // period, torch.inf)
    best = total.min(1)
    return best.values.nan_to_num(nan=torch.inf), chosen, best.indices
