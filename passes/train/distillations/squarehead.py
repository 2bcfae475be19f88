"""SquareHead: hidden states, each block's error divided by the size of what it should be (Kurtic et al., arXiv:2310.06927, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.distillation import Seen
from sparsify_compiler.passes.train.distillations._base import relative

STATISTICS: tuple[str, ...] = ("states",)


def squarehead(student: Seen, teacher: Seen, *, weight: float = 1.0) -> Tensor:
    """weight * mean over the blocks of |s - t|² / |t|², over the real tokens."""
    return weight * torch.stack([relative(s, t, teacher) for s, t in zip(student.states, teacher.states, strict=True)]).mean()
