"""Random: a fixed random linear (SMoE-Dropout, arXiv:2303.01610, section 3.1), which is also what the others must beat."""

from __future__ import annotations

from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes.moe.routers._base import Task, normal, scored


def random(task: Task) -> Formula:
    """By the seed."""
    return Formula({"weight": normal((task.experts, task.evidence.ffn.gate.shape[1]), task.evidence)}, scored)
