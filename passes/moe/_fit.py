"""Linear functions fitted to calibration in closed form: of routers, and of what makes up for skipped experts."""

from __future__ import annotations

import torch
from torch import Tensor


def ridge_of(x: Tensor, wanted: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """(weight float32 [outputs, K], offset [outputs]) with weight x + offset near wanted, by least squares: x [R, K], wanted [R, outputs].

    Both are brought to mean 0 first; damp times the mean of the Gram matrix's diagonal is added to that diagonal. Solved in float64.
    """
    mean, level = x.mean(0), wanted.mean(0)
    centred = (x - mean).double()
    gram = centred.T @ centred
    gram.diagonal().add_(damp * gram.diagonal().mean().clamp_min(1e-30))
    weight = torch.linalg.solve(gram, centred.T @ (wanted - level).double()).T.float()
    return weight, level - weight @ mean
