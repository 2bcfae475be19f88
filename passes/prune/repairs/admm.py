"""ADMM: values and, where asked for, the mask, by alternating between the least squares problem and the cut (arXiv:2401.02938)."""

from __future__ import annotations

import torch

from sparsify_compiler.passes.prune.repairs._base import Cut, Repaired, damped
from sparsify_compiler.passes.prune.repairs.least_squares import pulled

STATISTICS: tuple[str, ...] = ("patch_gram",)
CHOOSES = True


def admm(cut: Cut, *, steps: int = 20, gradual: int = 15, damping: float = 0.1, rho: float = 1.0) -> Repaired:
    """min ||X w - X w0||^2 subject to the mask, inputs scaled to norm one; one factorisation serves all rows and all steps.

    Without a mask, what is kept is chosen on the way by the scaled |w| (which is Wanda's score), fewer and fewer weights over the first
    `gradual` steps: density 1 - (1 - d) * (t / gradual)^3. Structures that fix their density have theirs from the first step on.

    damping  share of the (then unit) diagonal that is added;  rho  weight of the cut
    """
    matrix, _, note = damped(cut.statistics["patch_gram"], damping, cut.weight.dtype)
    norm = matrix.diagonal().sqrt()
    scaled = matrix / norm / norm[:, None]
    target = pulled(cut.target(), matrix, cut) / norm
    scaled.diagonal().add_(rho)
    factor = torch.linalg.cholesky(scaled)
    weight = cut.weight * norm
    dual = torch.zeros_like(weight)
    mask = cut.given_mask() if cut.mask is not None else None
    for step in range(steps):
        density = 1 - (1 - cut.density) * min((step + 1) / max(gradual, 1), 1.0) ** 3
        now = mask if mask is not None else cut.structure.mask((weight + dual).abs(), cut.structure.density or density)
        kept = (weight + dual) * now
        dual = dual + weight - kept
        weight = torch.cholesky_solve((target + rho * (kept - dual)).T, factor).T
    final = mask if mask is not None else cut.structure.mask((weight + dual).abs(), cut.density)
    return Repaired((weight + dual) * final / norm, final, note=note)
