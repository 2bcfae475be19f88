"""One update of one mask: drop, grow, and keep the structure. Plain functions of tensors."""

from __future__ import annotations

import math

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


def regrown(mask: Tensor, score: Tensor, growth: Tensor, structure: Structure, density: float, fraction: float, least: float = 0.0) -> Tensor:
    """A mask of `density`: the best of what is kept but for a `fraction`, then what grows best, of places dropped just now too (RigL, algorithm 1).

    mask bool, score and growth float >= 0, of the weight's shape [out, in, ...]. With `least`, rows go as a whole in which less than that share of
    the inputs a row has on average is salient: kept, or among the best to grow as many as were dropped; their places go to the others (SRigL,
    arXiv:2305.02299, section 3.1).
    """
    keep = mask & cut(structure.loose, score.masked_fill(~mask, -math.inf), density * (1 - fraction))
    growth = growth.to(torch.promote_types(growth.dtype, torch.float32))
    ranking = torch.where(keep, CHOSEN, growth / growth.max().clamp_min(torch.finfo(growth.dtype).tiny))
    if not least:
        return cut(structure, ranking, density)
    rows = _salient(keep, growth, mask, density, least)
    found = torch.zeros_like(mask)
    found[rows] = cut(structure, ranking[rows], density * len(rows) / max(int(rows.sum()), 1))
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
