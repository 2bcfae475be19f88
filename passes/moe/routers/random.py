"""Random: a fixed random linear (SMoE-Dropout, arXiv:2303.01610, section 3.1), which is also what the others must beat."""

from __future__ import annotations

import torch

from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes.moe.routers._base import Task, normal, scored


def random(task: Task) -> Formula:
    """By the seed."""
    weight = normal((task.experts, task.evidence.ffn.gate.shape[1]), task.evidence)
    return Formula({"weight": weight, "offset": torch.zeros(task.experts, dtype=torch.float32)}, scored)
