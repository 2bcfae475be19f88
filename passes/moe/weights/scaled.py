"""Scaled: 1 + u * softmax(score), with u = 0 to begin with, so that training may open what routing has to say (CMoE, arXiv:2502.04416)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes.moe.weights._base import of_chosen


def scaled(experts: int) -> Formula:
    """u float32 [E]."""
    return Formula({"scale": torch.zeros(experts, dtype=torch.float32)}, _scaled)


def _scaled(scores: Tensor, chosen: Tensor, scale: Tensor) -> Tensor:
    return of_chosen(1 + scores.softmax(-1) * scale, chosen)
