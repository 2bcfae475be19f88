"""Attention maps: where each token looks (MiniLM, arXiv:2002.10957, section 3.1, of every layer in place of the last)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.distillation import Seen
from sparsify_compiler.passes.train.distillations._base import over_tokens

STATISTICS: tuple[str, ...] = ("attention",)


def attention_maps(student: Seen, teacher: Seen, *, weight: float = 1.0) -> Tensor:
    """weight * mean over the attentions and heads of KL(teacher || student) of the weights of each row, over the real tokens."""
    rows = [(t.exp() * (t - s)).sum(-1).mT for s, t in zip(student.attention, teacher.attention, strict=True)]
    return weight * torch.stack([over_tokens(row, teacher) for row in rows]).mean()
