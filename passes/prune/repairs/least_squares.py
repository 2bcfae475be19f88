"""Least squares: the best values of the weights that are kept, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.passes.prune.repairs._base import Cut, Repaired, damped

STATISTICS: tuple[str, ...] = ("patch_gram",)
CHOOSES = False
BYTES = 1 << 27  # of the matrices that are solved at one time


def least_squares(cut: Cut, *, damping: float = 0.01) -> Repaired:
    """Row by row, min over the kept w of ||X w - y||^2 + damping * mean(diag X^T X) * ||w - w0||^2, y what the uncut row w0 gave."""
    matrix, _, note = damped(cut.statistics["patch_gram"], damping, cut.weight.dtype)
    mask = cut.given_mask()
    return Repaired(solve(matrix, pulled(cut.target(), matrix, cut), mask), mask, note=note)


def pulled(target: Tensor, matrix: Tensor, cut: Cut) -> Tensor:
    """The right-hand side of the damped problem: the damping pulls towards the weight as it was."""
    return target + cut.weight * (matrix - cut.statistics["patch_gram"].to(matrix)).diagonal()


def solve(matrix: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """w [out, K] with matrix[S, S] w[S] = target[S] on the kept set S of each row, and zero beyond it. `matrix` is positive definite."""
    if mask.shape[0] and bool((mask == mask[0]).all()):  # whole columns: one system for all rows
        kept, found = mask[0].nonzero()[:, 0], torch.zeros_like(target)
        factor = torch.linalg.cholesky(matrix[kept][:, kept])
        return found.index_copy_(1, kept, torch.cholesky_solve(target[:, kept].T, factor).T)
    counts = mask.sum(1)
    order = counts.argsort()  # rows that keep about as many are solved together
    found = torch.zeros_like(target)
    begin = 0
    while begin < len(order):
        largest = int(counts[order[-1]])
        rows = order[begin : begin + max(1, BYTES // (matrix.element_size() * max(1, largest) ** 2))]
        begin += len(rows)
        size = int(counts[rows].max())
        if size == 0:
            continue
        places = mask[rows].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :size]
        real = torch.arange(size, device=mask.device) < counts[rows, None]
        system = matrix[places[:, :, None], places[:, None, :]]
        system *= real[:, :, None] & real[:, None, :]
        system.diagonal(dim1=1, dim2=2).masked_fill_(~real, 1)
        right = target[rows].gather(1, places) * real
        values = torch.cholesky_solve(right.unsqueeze(2), torch.linalg.cholesky(system)).squeeze(2)
        found[rows] = torch.zeros_like(found[rows]).scatter_(1, places, values * real)
    return found * mask
