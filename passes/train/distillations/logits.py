"""Logits: the teacher's distribution over classes or tokens, softened (Hinton et al., arXiv:1503.02531, section 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax

from sparsify_compiler.distillation import Seen
from sparsify_compiler.passes.train.distillations._base import over_tokens

STATISTICS: tuple[str, ...] = ("outputs",)
NUMBERS = 2**19  # of logits that are looked at together, which caches hold


def logits(student: Seen, teacher: Seen, *, weight: float = 1.0, temperature: float = 1.0) -> Tensor:
    """weight * temperature² * KL(teacher || student) of the first output, [..., classes], over the real tokens."""
    each: Tensor = _Divergence.apply(student.outputs[0], teacher.outputs[0], temperature)  # type: ignore[no-untyped-call]
    return weight * temperature**2 * over_tokens(each.unsqueeze(-1), teacher)


class _Divergence(torch.autograd.Function):
    """KL(softmax(teacher / T) || softmax(student / T)) over the last dimension, float32 [...].

    Its gradient, (softmax(student / T) - softmax(teacher / T)) / T, is made along with it, some rows at a time, and kept in the student's dtype:
    of logits over a vocabulary, hundreds of megabytes a batch, no float32 copy is ever made. A class that the teacher rules out (-inf) adds nothing.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        classes = student.shape[-1]
        ours, theirs = student.reshape(-1, classes), teacher.reshape(-1, classes)
        slopes = torch.empty_like(ours) if ctx.needs_input_grad[0] else None
        found = ours.new_empty(len(ours), dtype=torch.float32)
        rows = max(1, NUMBERS // max(1, classes))
        for start in range(0, len(ours), rows):
            part = slice(start, start + rows)
            s, t = (log_softmax(logits[part].float() / temperature, -1) for logits in (ours, theirs))
            p = t.exp()
            found[part] = torch.where(p > 0, p * t.sub_(s), 0.0).sum(-1)
            if slopes is not None:
                slopes[part] = s.exp_().sub_(p).div_(temperature)
        ctx.save_for_backward(slopes)
        return found.reshape(student.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes.view(*above.shape, slopes.shape[-1]).mul(above.unsqueeze(-1).to(slopes.dtype)), None, None
