"""Aligned: OBS and least squares towards what the dense model computes, rather than towards the layer's own output on inputs that are off already.

Ours. The target as in asymmetric calibration (GPTAQ, arXiv:2504.02692), the mask and its repair as in SparseGPT (arXiv:2301.00774).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sparsify_compiler.passes.prune.repairs._base import Cut, Repaired, damped
from sparsify_compiler.passes.prune.repairs.least_squares import solve
from sparsify_compiler.passes.prune.repairs.obs import inverse_factor, sweep_columns

STATISTICS: tuple[str, ...] = ("patch_gram", "cross", "residual")
CHOOSES = True


def aligned(cut: Cut, *, pull: float = 3.0, damping: float = 0.1, refit: float = 0.3, power: float = 0.5, columns: int = 128) -> Repaired:
    """First move the whole weight to where the cut model's rows X give the dense model's output Y, then cut it by OBS, then solve for what is kept.

    Y is the layer's output in the dense model; where it is added to a residual stream, also what that stream is short of by now. A few thousand
    rows say little about most directions of X, so each step is pulled to the weight that it starts from: pull and refit in the two least squares
    problems, damping in OBS, all as shares of the mean diagonal of X^T X. power of the first two is that of `damped`.
    """
    dtype = cut.weight.dtype
    gram = cut.statistics["patch_gram"].to(dtype)
    pulled, factor, _ = damped(gram, pull, dtype, power)
    target = cut.target() + cut.weight * (pulled - gram).diagonal()
    moved = torch.cholesky_solve(target.T, factor).T
    upper, note = inverse_factor(gram, damping, dtype)
    swept, mask = sweep_columns(replace(cut, weight=moved), moved, upper, columns)
    matrix, _, _ = damped(gram, refit, dtype, power)
    return Repaired(solve(matrix, moved @ matrix, mask, swept), mask, note=note)
