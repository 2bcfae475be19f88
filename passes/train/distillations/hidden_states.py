"""Hidden states: the mean square error of the residual stream behind every block (TinyBERT, arXiv:1909.10351, equation 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.distillation import Seen
from sparsify_compiler.passes.train.distillations._base import over_tokens

STATISTICS: tuple[str, ...] = ("states",)


def hidden_states(student: Seen, teacher: Seen, *, weight: float = 1.0) -> Tensor:
    """weight * mean over the blocks of the mean of (s - t)², over the real tokens."""
    errors = [over_tokens((s.float() - t.float()).square(), teacher) for s, t in zip(student.states, teacher.states, strict=True)]
    return weight * torch.stack(errors).mean()
