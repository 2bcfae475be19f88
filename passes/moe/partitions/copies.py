"""Copies: every expert is the whole FFN, and training tells them apart (Sparse Upcycling, arXiv:2212.05055, section 3)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.moe._evidence import Evidence


def copies(evidence: Evidence, neurons: Tensor, experts: int) -> Tensor:
    """Dense with weights that sum up to 1: weight="normalised"."""
    return neurons.expand(experts, -1).clone()
