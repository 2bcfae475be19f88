"""Slices: experts are windows on the FFN's neurons, which may overlap (the width path of VersatileFFN, but each a copy)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.errors import ParseError
from sparsify_compiler.passes.moe._evidence import Evidence


def slices(evidence: Evidence, neurons: Tensor, experts: int, *, width: float = 0.25) -> Tensor:
    """Windows of `width` of the neurons, at equal distances, around the end. Raises ParseError for a width out of (0, 1]."""
    if not 0 < width <= 1:
        raise ParseError(f"width lies above 0 and at most at 1, got {width}", where="partition slices")
    count = neurons.numel()
    size = max(1, round(width * count))
    starts = torch.arange(experts, dtype=torch.int64) * count // experts
    return neurons[(starts[:, None] + torch.arange(size, dtype=torch.int64)) % count]
