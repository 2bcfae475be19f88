"""Shifted ReLU: what lies below a shift is zero as well (ReLU Strikes Back, arXiv:2310.04564, section 5.3)."""

from __future__ import annotations

from torch.nn import functional

from sparsify_compiler.passes.activation.functions._base import Activation


def shifted_relu(*, shift: float = 1.0, learned: bool = True) -> Activation:
    """max(x - shift, 0). The shift goes into the bias of the linear before, so it costs nothing, and learns as freely as a bias does.

    learned  whether a linear that had no bias gets one that is trained, a number a neuron; a bias that it had is trained as before
    """
    return Activation(lambda x: functional.relu(x), shift=shift, learned=learned)
