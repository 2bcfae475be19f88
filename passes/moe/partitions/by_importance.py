"""By importance: the most important neurons in the first expert, and so on, or dealt out to all alike (Dense2MoE, arXiv:2510.09094)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.named import Named
from sparsify_compiler.passes.moe._balance import table_of
from sparsify_compiler.passes.moe._evidence import Evidence

STATISTICS = ("rows", "slopes")


def by_importance(evidence: Evidence, neurons: Tensor, experts: int, *, of: str = "taylor", dealt: bool = True) -> Tensor:
    """of: a file of passes/moe/importances. dealt: experts are alike, each with neurons of every rank; else ranked, each with its own."""
    order = Named.parse("importance", of)(evidence)[neurons].argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), dtype=torch.int64))
    return table_of(neurons, rank % experts if dealt else rank * experts // rank.numel(), experts)
