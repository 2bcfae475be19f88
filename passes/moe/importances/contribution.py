"""Contribution: the size of what a neuron adds to the output, over all rows (FFSplit, arXiv:2401.04044, section 3)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.moe._evidence import Evidence

STATISTICS = ("rows",)


def contribution(evidence: Evidence) -> Tensor:
    """The L2 norm over the rows of |neuron| * |its column of down|."""
    return evidence.neurons.square().sum(0).sqrt() * evidence.lengths
