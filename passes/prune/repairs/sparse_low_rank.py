"""Sparse + low-rank: what a mask cannot hold goes into two thin dense layers beside it (OATS, arXiv:2409.13652)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.prune.repairs._base import Cut, Repaired

STATISTICS: tuple[str, ...] = ("patch_norm",)
CHOOSES = True


def sparse_low_rank(cut: Cut, *, share: float = 0.25, rounds: int = 20) -> Repaired:
    """min ||(W - S - L) D||, D the norms of the inputs: alternate between the best L of rank r for W - S and the best S under its mask for W - L.

    share   of the budget's numbers that L takes: r = share * density * out * K / (out + K). Where the structure fixes its density, or the mask is
            given, L comes on top of it
    rounds  of the alternation

    Raises StructureError for a share that is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise StructureError(f"the share of the low-rank part lies between 0 and 1, got {share}", where="repair sparse_low_rank")
    norm = cut.statistics["patch_norm"].to(cut.weight)
    norm = torch.where(norm > 0, norm, torch.where(norm > 0, norm, torch.inf).min().clamp(max=1.0))  # of an input that is always zero: the smallest
    scaled = cut.weight * norm
    rows, columns = scaled.shape
    rank = max(1, min(rows, columns, int(share * cut.density * rows * columns / (rows + columns))))
    free = cut.mask is None and cut.structure.density is None
    density = max(cut.density - rank * (rows + columns) / (rows * columns), 1 / scaled.numel()) if free else cut.density
    sparse, mask = torch.zeros_like(scaled), cut.mask
    reads = torch.linalg.svd(scaled, full_matrices=False)[2][:rank]
    for _ in range(rounds):
        writes, reads = _best(scaled - sparse, reads)
        rest = scaled - writes @ reads
        mask = cut.structure.mask(rest.abs(), density) if cut.mask is None else cut.mask
        sparse = rest * mask
    assert mask is not None
    return Repaired(sparse / norm, mask, low_rank=(reads / norm, writes))


def _best(matrix: Tensor, reads: Tensor) -> tuple[Tensor, Tensor]:
    """(writes [out, r], reads [r, K]): the projection on the leading directions, by one step of subspace iteration from `reads`."""
    basis = torch.linalg.qr(matrix @ reads.T)[0]
    return basis, basis.T @ matrix
