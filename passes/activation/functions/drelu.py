"""dReLU: ReLU on the gate and on the up projection of a gated FFN (Turbo Sparse, arXiv:2406.05955, section 3)."""

from __future__ import annotations

from torch.nn import functional

from sparsify_compiler.passes.activation.functions._base import Activation


def drelu() -> Activation:
    """max(gate, 0) * max(up, 0). An FFN without a gate gets ReLU."""
    return Activation(lambda x: functional.relu(x), up="relu")
