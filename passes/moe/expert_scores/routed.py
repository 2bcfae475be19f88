"""Routed: how much of the rows' weight the router gives an expert (Task-Specific Expert Pruning, Chen et al., arXiv:2206.00277, section 3)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.moe._observed import Observed


def routed(evidence: Observed) -> Tensor:
    """The sum over the rows of its weight, where it was chosen; without weights, the number of those rows."""
    return evidence.summed(evidence.weights.abs())
