"""Score: ReLU of the score over the root mean square of all of them, times a learned factor each (BlockFFN, arXiv:2507.08771, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes.moe.weights._base import of_chosen


def score(experts: int) -> Formula:
    """factor float32 [E], 1 to begin with."""
    return Formula({"factor": torch.ones(experts, dtype=torch.float32)}, _score)


def _score(scores: Tensor, chosen: Tensor, factor: Tensor) -> Tensor:
    open_ = scores.relu()
    return of_chosen(open_ * (open_.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * factor, chosen)
