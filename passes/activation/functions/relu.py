"""ReLU in the place of a smooth activation (ReLU Strikes Back, arXiv:2310.04564; ProSparse, arXiv:2402.13516)."""

from __future__ import annotations

from torch.nn import functional

from sparsify_compiler.passes.activation.functions._base import Activation


def relu() -> Activation:
    """max(x, 0)."""
    return Activation(lambda x: functional.relu(x))
