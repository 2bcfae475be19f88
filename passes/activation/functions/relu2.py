"""Squared ReLU (Primer, arXiv:2109.08668; ReLU² Wins, arXiv:2402.03804)."""

from __future__ import annotations

from torch.nn import functional

from sparsify_compiler.passes.activation.functions._base import Activation


def relu2() -> Activation:
    """max(x, 0)²."""
    return Activation(lambda x: functional.relu(x).square())
