"""Outputs: the relative mean square error of what the model gives."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.distillation import Seen
from sparsify_compiler.passes.train.distillations._base import relative

STATISTICS: tuple[str, ...] = ("outputs",)


def outputs(student: Seen, teacher: Seen, *, weight: float = 1.0) -> Tensor:
    """weight * mean over the floating outputs of |s - t|² / |t|², over the real tokens."""
    return weight * torch.stack([relative(s, t, teacher) for s, t in zip(student.outputs, teacher.outputs, strict=True)]).mean()
