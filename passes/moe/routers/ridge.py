"""Ridge: how much an expert matters, as a linear function of x fitted to calibration in closed form."""

from __future__ import annotations

from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes.moe._fit import ridge_of
from sparsify_compiler.passes.moe.routers._base import Task, scored

STATISTICS = ("rows",)


def ridge(task: Task, *, damp: float = 0.01) -> Formula:
    """Least squares on rows and experts brought to mean 0, with damp times the mean variance of x on the diagonal."""
    weight, offset = ridge_of(task.evidence.x, task.wanted, damp)
    return Formula({"weight": weight, "offset": offset}, scored)
