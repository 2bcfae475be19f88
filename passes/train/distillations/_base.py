"""What a distillation loss is given, and what such losses share.

A loss is a function `name(student, teacher, *, options...) -> Tensor []` in a file of its own, of two Seen: what both models made of one batch.
A module constant STATISTICS says what of it the loss looks at: "outputs", "states", "attention". Differentiable in what is the student's.
"""

from __future__ import annotations

import math

from torch import Tensor

from sparsify_compiler.distillation import Seen


def over_tokens(error: Tensor, seen: Seen) -> Tensor:
    """The mean of an error float32 [batch, tokens, ...] over the real tokens; over all where the batch has no tokens of this shape."""
    real = seen.tokens
    if real is None or error.shape[:2] != real.shape:
        return error.mean()
    rows = error.reshape(*real.shape, math.prod(error.shape[2:])).mean(-1)  # told, as an empty batch leaves it open
    return (rows * real).sum() / real.sum().clamp_min(1)


def relative(student: Tensor, teacher: Tensor, seen: Seen) -> Tensor:
    """The mean square of the difference over that of the teacher's values."""
    target = teacher.float()
    return over_tokens((student.float() - target).square(), seen) / over_tokens(target.square(), seen).clamp_min(1e-12)
