"""Contiguous: neurons as they stand in the weights, expert by expert (FactorLLM, arXiv:2408.11855)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.passes.moe._balance import table_of
from sparsify_compiler.passes.moe._evidence import Evidence


def contiguous(evidence: Evidence, neurons: Tensor, experts: int) -> Tensor:
    """As many neurons in each as can be, the first experts one more where they do not divide."""
    places = torch.arange(neurons.numel(), dtype=torch.int64)
    return table_of(neurons, places * experts // neurons.numel(), experts)
