"""Constant: a blend of what it reads and of a learned vector, in shares that depend on the row (MoE++, arXiv:2410.07348)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.passes.moe._evidence import Evidence, Formula
from sparsify_compiler.passes.moe.free_experts.copy import copy


def constant(evidence: Evidence) -> Formula:
    """a x + b vector, [a, b] = softmax(shares x). The vector begins as 0, the shares at one half each. Raises ParseError as copy does."""
    copy(evidence)
    width = evidence.ffn.gate.shape[1]
    return Formula({"shares": torch.zeros(2, width, dtype=torch.float32), "vector": torch.zeros(width, dtype=torch.float32)}, _blended)


def _blended(x: Tensor, shares: Tensor, vector: Tensor) -> Tensor:
    odds = linear(x, shares).softmax(-1)
    return odds[..., :1] * x + odds[..., 1:] * vector
