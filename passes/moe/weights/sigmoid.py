"""Sigmoid: of the expert's own score, whatever the others have; one expert alone has a weight that learns (Mixture-of-Depths, arXiv:2404.02258)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes.moe.weights._base import of_chosen


def sigmoid(experts: int) -> Formula:
    """sigmoid(scores), of the chosen."""
    return Formula({}, _sigmoid)


def _sigmoid(scores: Tensor, chosen: Tensor) -> Tensor:
    return of_chosen(scores.sigmoid(), chosen)
