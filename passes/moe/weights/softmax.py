"""Softmax: the probability of the expert among all of them (Switch Transformer, arXiv:2101.03961)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes.moe.weights._base import of_chosen


def softmax(experts: int) -> Formula:
    """softmax(scores), of the chosen."""
    return Formula({}, _softmax)


def _softmax(scores: Tensor, chosen: Tensor) -> Tensor:
    return of_chosen(scores.softmax(-1), chosen)
