"""One update of one mask: drop, grow, and keep the structure. Plain functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify_compiler.passes.prune.structures._base import SLACK, Structure

CHOSEN = 2.0  # in a ranking whose other scores lie between 0 and 1


def cut(structure: Structure, score: Tensor, density: float) -> Tensor:
    """The mask of a score at a density that may change, nothing at 0; of a structure that fixes its own, what comes nearest from above."""
    if density <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    fitted = structure.at(min(density, 1.0))
    if fitted is None or density >= 1:
        return torch.ones_like(score, dtype=torch.bool)
    return fitted.mask(score, density if fitted.density is None else fitted.density)


def thinned(mask: Tensor, score: Tensor, structure: Structure, density: float) -> Tensor:
    """The best of what is kept; nothing comes back."""
    return mask & cut(structure, score.masked_fill(~mask, -math.inf), density)


def regrown(mask: Tensor, score: Tensor, growth: Tensor, structure: Structure, density: float, stays: float, least: float = 0.0) -> Tensor:
    """A mask of `density`: the best of what is kept, down to the density `stays`, then what grows best, of what was dropped too (RigL, algorithm 1).

    mask bool, score and growth float >= 0, of the weight's shape [out, in, ...]. With `least`, rows go as a whole in which less than that share of
    the inputs a row has on average is salient: kept, or among the best to grow as many as were dropped; their places go to the others (SRigL,
    arXiv:2305.02299, section 3.1).
    """
    keep = mask & cut(structure.loose, score.masked_fill(~mask, -math.inf), stays)
    growth = growth.to(torch.promote_types(growth.dtype, torch.float32))
    ranking = torch.where(keep, CHOSEN, growth / growth.max().clamp_min(torch.finfo(growth.dtype).tiny))
    if not least:
        return cut(structure, ranking, density)
    rows = _salient(keep, growth, mask, density, least)
    found = torch.zeros_like(mask)
    found[rows] = cut(structure, ranking[rows], density * len(rows) / max(int(rows.sum()), 1))
    return found


def shared(total: int, room: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `total` and are in proportion to weights >= 0, none above its room; all rooms together hold the total."""
    wanted, open_ = [0.0] * len(room), [i for i, size in enumerate(room) if size]
    while open_ and total - sum(wanted) > SLACK:
        left, sum_ = total - sum(wanted), sum(weights[i] for i in open_)
        for i in open_:
            part = weights[i] / sum_ if sum_ > 0 else 1 / len(open_)
            wanted[i] = min(float(room[i]), wanted[i] + left * part)
        open_ = [i for i in open_ if wanted[i] < room[i]]  # of weight 0 too: they get what the others have no room for
    found = [math.floor(value + SLACK) for value in wanted]
    for i in sorted(range(len(room)), key=lambda i: found[i] - wanted[i])[: total - sum(found)]:
        found[i] += 1
    return found


def _salient(keep: Tensor, growth: Tensor, mask: Tensor, density: float, least: float) -> Tensor:
    """bool [out]: the rows that stay, always enough of them to hold what is kept."""
    dropped = int(mask.sum()) - int(keep.sum())
    best = torch.zeros_like(keep).flatten()
    best[growth.flatten().topk(max(dropped, 0)).indices] = True
    counts = (keep.flatten() | best).view(len(keep), -1).sum(1)
    needed = math.ceil(density * len(keep) - SLACK)
    limit = max(1, int(least * density * keep[0].numel()))
    return counts >= min(limit, int(counts.topk(needed).values[-1]))
