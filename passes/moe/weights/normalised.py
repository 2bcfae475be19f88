"""Normalised: the probability of the expert among those that are chosen (Mixtral, arXiv:2401.04088; Sparse Upcycling, arXiv:2212.05055)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes.moe.weights._base import of_chosen


def normalised(experts: int) -> Formula:
    """softmax(scores) over its sum over the chosen."""
    return Formula({}, _normalised)


def _normalised(scores: Tensor, chosen: Tensor) -> Tensor:
    found = of_chosen(scores.softmax(-1), chosen)
    return found / found.sum(-1, keepdim=True).clamp_min(1e-20)
