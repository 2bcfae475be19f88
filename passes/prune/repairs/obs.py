"""OBS: each weight that goes is made up for by those behind it (SparseGPT, arXiv:2301.00774)."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparsify_compiler.passes.prune.repairs._base import Cut, Repaired, damped, windows
from sparsify_compiler.passes.prune.structures._base import Structure

STATISTICS: tuple[str, ...] = ("patch_gram",)
CHOOSES = True
HALVED = 256  # a triangular matrix of more columns is inverted by halves
LEAF = 16  # columns of which each is taken from the others one by one
_FACTORS: MutableMapping[Tensor, dict[tuple[float, torch.dtype], tuple[Tensor, str]]] = WeakTensorKeyDictionary()


def obs(cut: Cut, *, damping: float = 0.01, columns: int = 128) -> Repaired:
    """SparseGPT, algorithm 1: columns from left to right, the error of each spread over the columns to its right.

    Without a mask, what is kept is chosen on the way, `columns` at a time (for n:m a group at a time), by w^2 / [U]_cc^2, U the upper
    Cholesky factor of the inverse of the damped Gram matrix: the error that the weight's loss causes, with what is behind it made up for.

    damping  share of the mean diagonal of the Gram matrix that is added to its diagonal
    """
    upper, note = inverse_factor(cut.statistics["patch_gram"], damping, cut.weight.dtype)
    weight, mask = sweep_columns(cut, cut.weight, upper, columns)
    return Repaired(weight, mask, note=note)


def at_densities(cut: Cut, densities: Sequence[float], *, damping: float = 0.01, columns: int = 128) -> list[Tensor]:
    """The new weights that the repair would give at each density, where it chooses the mask: copies of the layer, below each other, are swept once.

    Sweeping is many small steps, of which a few hundred outputs take hardly longer than a few.
    """
    upper, _ = inverse_factor(cut.statistics["patch_gram"], damping, cut.weight.dtype)
    weight, _ = sweep_columns(cut, cut.weight.repeat(len(densities), 1), upper, columns, densities)
    return list(weight.chunk(len(densities)))


def inverse_factor(gram: Tensor, damping: float, dtype: torch.dtype) -> tuple[Tensor, str]:
    """(U, note): U^T U is the inverse of the damped Gram matrix, U upper triangular. Kept for as long as somebody holds that matrix: layers that
    read one value share it, and so do all densities and structures that are tried of a layer."""
    known = _FACTORS.setdefault(gram, {})
    if (damping, dtype) not in known:
        _, factor, note = damped(gram.flip(0, 1), damping, dtype)  # G = M M^T with M upper triangular, so that U is its inverse
        known[damping, dtype] = _inverse(factor.flip(0, 1)), note
    return known[damping, dtype]


def _inverse(upper: Tensor) -> Tensor:
    """Of an upper triangular matrix, by halves: products of matrices are faster than solving for the unit matrix."""
    size = upper.shape[0]
    if size <= HALVED:
        small: Tensor = torch.linalg.solve_triangular(upper, torch.eye(size, dtype=upper.dtype, device=upper.device), upper=True)
        return small
    half, found = size // 2, torch.zeros_like(upper)
    found[:half, :half], found[half:, half:] = _inverse(upper[:half, :half]), _inverse(upper[half:, half:])
    found[:half, half:] = -(found[:half, :half] @ upper[:half, half:]) @ found[half:, half:]
    return found


def sweep_columns(cut: Cut, weight: Tensor, upper: Tensor, columns: int, densities: Sequence[float] = ()) -> tuple[Tensor, Tensor]:
    """(new weight, mask) of `weight` [out, K] under the cut's mask, or under one chosen on the way: at the cut's density, or at several, each in
    one of as many equal parts of the outputs."""
    weight, densities = weight.clone(), densities or (cut.density,)
    weight[:, cut.statistics["patch_gram"].diagonal() <= 0] = 0
    width = weight.shape[1]
    mask = torch.ones_like(weight, dtype=torch.bool) if cut.mask is None else cut.mask
    chosen: dict[int, tuple[int, list[float]]] = {}
    for density in densities if cut.mask is None else ():
        for start, end, share in windows(cut.structure, width, columns, density):
            chosen.setdefault(start, (end, []))[1].append(share)
    start = 0
    while start < width:
        end = min(start + columns, width)
        end = max(end, max((stop for begin, (stop, _) in chosen.items() if start <= begin < end), default=end))
        inside = {begin - start: (stop - start, shares) for begin, (stop, shares) in chosen.items() if start <= begin < end}
        here, kept = weight[:, start:end].T.contiguous(), mask[:, start:end].T.contiguous()
        errors = _sweep_block(here, kept, upper[start:end, start:end], cut.structure, inside)
        weight[:, start:end], mask[:, start:end] = here.T, kept.T
        weight[:, end:].addmm_(errors.T, upper[start:end, end:], alpha=-1)
        start = end
    return weight * mask, mask


def _sweep_block(here: Tensor, kept: Tensor, upper: Tensor, structure: Structure,
                 chosen: Mapping[int, tuple[int, Sequence[float]]]) -> Tensor:
    """The errors [columns, out] of some columns; `here` [columns, out], a column of the weight a row, and `kept` change in place.

    chosen  the first column of a window -> (its end, its density in each of equal parts of the outputs), where the mask is not given

    LEAF columns at a time, or up to where the next window is chosen: what one causes behind those is left for a product of matrices.
    """
    errors, diagonal = torch.empty_like(here), upper.diagonal()[:, None]
    gone = ~kept / diagonal
    start, width = 0, here.shape[0]
    while start < width:
        if start in chosen:
            stop, shares = chosen[start]
            parts = (here[start:stop] / diagonal[start:stop]).square().T.chunk(len(shares))
            kept[start:stop] = torch.cat([choose(structure, part, share) for part, share in zip(parts, shares, strict=True)]).T
            gone[start:stop] = ~kept[start:stop] / diagonal[start:stop]
        end = min(start + LEAF, width, *(begin for begin in chosen if begin > start))
        for i in range(start, end):
            torch.mul(here[i], gone[i], out=errors[i])
            here[i:end].addr_(upper[i, i:end], errors[i], alpha=-1)
        here[end:].addmm_(upper[start:end, end:].T, errors[start:end], alpha=-1)
        start = end
    return errors


def choose(structure: Structure, saliency: Tensor, density: float) -> Tensor:
    """The structure's mask of some of the columns; nothing or all of them where the density says so."""
    if density <= 0 or density >= 1:
        return torch.full_like(saliency, density >= 1, dtype=torch.bool)
    return structure.mask(saliency, density)
