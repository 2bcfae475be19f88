"""Activation rate: in how many rows a neuron is among the largest (CMoE, arXiv:2502.04416, section 3)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.moe._evidence import Evidence

STATISTICS = ("rows",)


def activation_rate(evidence: Evidence, *, share: float = 0.1) -> Tensor:
    """The share of the rows in which a neuron is in evidence.active(share)."""
    return evidence.active(share).float().mean(0)
