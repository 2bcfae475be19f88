"""Weight norm: what the weights alone say of a neuron, without any data."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.moe._evidence import Evidence


def weight_norm(evidence: Evidence) -> Tensor:
    """|its row of gate| * |its column of down|."""
    return evidence.ffn.gate.square().sum(1).sqrt() * evidence.lengths
