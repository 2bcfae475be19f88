"""Embeddings: the mean of the first output over the real tokens, as of sentence encoders (Reimers and Gurevych, arXiv:2004.09813, section 2)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.distillation import Seen

STATISTICS: tuple[str, ...] = ("outputs",)


def embeddings(student: Seen, teacher: Seen, *, weight: float = 1.0) -> Tensor:
    """weight * |s - t|² / |t|² of the pooled outputs [batch, width], of a first output [batch, tokens, width]."""
    s, t = (_pooled(seen.outputs[0].float(), teacher.tokens) for seen in (student, teacher))
    return weight * (s - t).square().sum() / t.square().sum().clamp_min(1e-12)


def _pooled(states: Tensor, tokens: Tensor | None) -> Tensor:
    """float32 [batch, width]."""
    if tokens is None or states.shape[:2] != tokens.shape:
        return states.flatten(1, -2).mean(1) if states.dim() > 2 else states
    return (states * tokens[..., None]).sum(1) / tokens.sum(1, keepdim=True).clamp_min(1)
