"""Taylor: how much the loss changes without a neuron, to first order (Dense2MoE, arXiv:2510.09094; Molchanov et al., arXiv:1906.10771)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.moe._evidence import Evidence

STATISTICS = ("rows", "slopes")


def taylor(evidence: Evidence) -> Tensor:
    """The root of the summed squares over the rows of neuron * slope."""
    return (evidence.neurons * evidence.needed_slopes()).square().sum(0).sqrt()
