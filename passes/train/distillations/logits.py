"""Logits: the teacher's distribution over classes or tokens, softened (Hinton et al., arXiv:1503.02531, section 2)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import log_softmax

from sparsify_compiler.distillation import Seen
from sparsify_compiler.passes.train.distillations._base import over_tokens

STATISTICS: tuple[str, ...] = ("outputs",)


def logits(student: Seen, teacher: Seen, *, weight: float = 1.0, temperature: float = 1.0) -> Tensor:
    """weight * temperature² * KL(teacher || student) of the first output, [..., classes], over the real tokens."""
    s, t = (log_softmax(seen.outputs[0].float() / temperature, -1) for seen in (student, teacher))
    return weight * temperature**2 * over_tokens((t.exp() * (t - s)).sum(-1, keepdim=True), teacher)
