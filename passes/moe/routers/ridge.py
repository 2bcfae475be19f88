"""Ridge: how much an expert matters, as a linear function of x fitted to calibration in closed form."""

from __future__ import annotations

import torch

from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes.moe.routers._base import Task, scored

STATISTICS = ("rows",)


def ridge(task: Task, *, damp: float = 0.01) -> Formula:
    """Least squares on rows and experts brought to mean 0, with damp times the mean variance of x on the diagonal."""
    x, wanted = task.evidence.x, task.wanted
    mean, level = x.mean(0), wanted.mean(0)
    centred = (x - mean).double()
    gram = centred.T @ centred
    gram.diagonal().add_(damp * gram.diagonal().mean().clamp_min(1e-30))
    weight = torch.linalg.solve(gram, centred.T @ (wanted - level).double()).T.float()
    return Formula({"weight": weight, "offset": level - weight @ mean}, scored)
