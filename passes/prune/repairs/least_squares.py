"""Least squares: the best values of the weights that are kept, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.passes.prune.repairs._base import Cut, Repaired, damped

STATISTICS: tuple[str, ...] = ("patch_gram",)
CHOOSES = False


def least_squares(cut: Cut, *, damping: float = 0.01) -> Repaired:
    """Row by row, min over the kept w of ||X w - y||^2 + damping * mean(diag X^T X) * ||w - w0||^2, y what the uncut row w0 gave."""
    matrix, _, note = damped(cut.statistics["patch_gram"], damping, cut.weight.dtype)
    mask = cut.given_mask()
    return Repaired(solve(matrix, pulled(cut.target(), matrix, cut), mask, cut.weight), mask, note=note)


def pulled(target: Tensor, matrix: Tensor, cut: Cut) -> Tensor:
    """The right-hand side of the damped problem: the damping pulls towards the weight as it was."""
    return target + cut.weight * (matrix - cut.statistics["patch_gram"].to(matrix)).diagonal()


def solve(matrix: Tensor, target: Tensor, mask: Tensor, start: Tensor | None = None) -> Tensor:
    """w [out, K] with matrix[S, S] w[S] = target[S] on the kept set S of each row, and zero beyond it. `matrix` is positive definite.

    Conjugate gradients for all rows together, one matrix product a step, scaled by the diagonal, until the residual of each row has fallen by
    eps^(3/4) of the dtype; a row is given up after 4 K steps, which only a matrix beyond the dtype's precision needs. `start` is a guess.
    """
    if mask.shape[0] and bool((mask == mask[0]).all()):  # whole columns: one system for all rows
        kept, alike = mask[0].nonzero()[:, 0], torch.zeros_like(target)
        factor = torch.linalg.cholesky(matrix[kept][:, kept])
        return alike.index_copy_(1, kept, torch.cholesky_solve(target[:, kept].T, factor).T)
    unit = matrix.diagonal().mean()  # squares of very small or large numbers leave the range of float32
    matrix, target = matrix / unit, target / unit
    scale = matrix.diagonal().reciprocal() * mask  # zero outside of S keeps every step inside
    found = torch.zeros_like(target) if start is None else start * mask
    residual = (target - found @ matrix) * mask
    limit = (target.square() * scale).sum(1) * torch.finfo(matrix.dtype).eps ** 1.5
    step = residual * scale
    left = (residual * step).sum(1)
    rows = (left > limit).nonzero().squeeze(1)
    residual, step, left = residual[rows], step[rows], left[rows]
    for _ in range(4 * len(matrix)):
        if not len(rows):
            break
        curved = step @ matrix
        length = (left / (step * curved).sum(1))[:, None]
        found[rows] += length * step
        residual = (residual - length * curved) * (scale[rows] > 0)
        ahead = residual * scale[rows]
        before, left = left, (residual * ahead).sum(1)
        step = ahead + (left / before)[:, None] * step
        going = left > limit[rows]
        if not bool(going.all()):
            rows, residual, step, left = rows[going], residual[going], step[going], left[going]
    return found
