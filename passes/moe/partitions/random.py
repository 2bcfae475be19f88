"""Random: neurons in random groups, which is what the others must beat (MoEfication, arXiv:2110.01786, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.passes.moe._balance import table_of
from sparsify_compiler.passes.moe._evidence import Evidence


def random(evidence: Evidence, neurons: Tensor, experts: int) -> Tensor:
    """By the seed."""
    order = torch.randperm(neurons.numel(), generator=evidence.generator())
    return table_of(neurons, order % experts, experts)
