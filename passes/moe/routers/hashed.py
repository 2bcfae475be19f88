"""Hashed: rows on the same sides of random planes share their experts (the idea of Hash Layers, arXiv:2106.04426, of x instead of the token)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes.moe.routers._base import Task, normal


def hashed(task: Task, *, bits: int = 16) -> Formula:
    """Random scores of the sides, which all rows of one code have in common."""
    whole = normal((bits + task.experts, max(bits, task.evidence.ffn.gate.shape[1])), task.evidence)
    return Formula({"planes": whole[:bits, : task.evidence.ffn.gate.shape[1]].clone(), "codes": whole[bits:, :bits].clone()}, _coded)


def _coded(x: Tensor, planes: Tensor, codes: Tensor) -> Tensor:
    return linear((linear(x, planes) >= 0).to(x.dtype), codes).float()
