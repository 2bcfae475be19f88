"""OBS: each weight that goes is made up for by those behind it (SparseGPT, arXiv:2301.00774)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.passes.prune.repairs._base import Cut, Repaired, damped, windows
from sparsify_compiler.passes.prune.structures._base import Structure

STATISTICS: tuple[str, ...] = ("patch_gram",)
CHOOSES = True


def obs(cut: Cut, *, damping: float = 0.01, columns: int = 128) -> Repaired:
    """SparseGPT, algorithm 1: columns from left to right, the error of each spread over the columns to its right.

    Without a mask, what is kept is chosen on the way, `columns` at a time (for n:m a group at a time), by w^2 / [U]_cc^2, U the upper
    Cholesky factor of the inverse of the damped Gram matrix: the error that the weight's loss causes, with what is behind it made up for.

    damping  share of the mean diagonal of the Gram matrix that is added to its diagonal
    """
    upper, note = inverse_factor(cut.statistics["patch_gram"], damping, cut.weight.dtype)
    weight, mask = sweep_columns(cut, cut.weight, upper, columns)
    return Repaired(weight, mask, note=note)


def inverse_factor(gram: Tensor, damping: float, dtype: torch.dtype) -> tuple[Tensor, str]:
    """(U, note): U^T U is the inverse of the damped Gram matrix, U upper triangular."""
    _, factor, note = damped(gram, damping, dtype)
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True), note


def sweep_columns(cut: Cut, weight: Tensor, upper: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """(new weight, mask) of `weight` [out, K] under the cut's mask, or under one chosen on the way."""
    weight = weight.clone()
    weight[:, cut.statistics["patch_gram"].diagonal() <= 0] = 0
    width = weight.shape[1]
    mask = torch.ones_like(weight, dtype=torch.bool) if cut.mask is None else cut.mask
    chosen = {start: (end, density) for start, end, density in windows(cut.structure, width, columns, cut.density)} if cut.mask is None else {}
    start = 0
    while start < width:
        end = min(start + columns, width)
        end = max(end, max((stop for begin, (stop, _) in chosen.items() if start <= begin < end), default=end))
        here, factor = weight[:, start:end], upper[start:end, start:end]
        errors = torch.zeros_like(here)
        for i in range(end - start):
            if start + i in chosen:
                stop, density = chosen[start + i]
                saliency = (here[:, i : stop - start] / factor.diagonal()[i : stop - start]).square()
                mask[:, start + i : stop] = choose(cut.structure, saliency, density)
            errors[:, i] = error = here[:, i] * ~mask[:, start + i] / factor[i, i]
            here[:, i:].addr_(error, factor[i, i:], alpha=-1)
        weight[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
        start = end
    return weight * mask, mask


def choose(structure: Structure, saliency: Tensor, density: float) -> Tensor:
    """The structure's mask of some of the columns; nothing or all of them where the density says so."""
    if density <= 0 or density >= 1:
        return torch.full_like(saliency, density >= 1, dtype=torch.bool)
    return structure.mask(saliency, density)
