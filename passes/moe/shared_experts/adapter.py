"""Adapter: each expert adds a narrow FFN of the shared one's output to it (PESC, arXiv:2401.02731)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sparsify_compiler.errors import ParseError
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.passes.moe._evidence import Formula


def adapter(width: int, experts: int, generator: torch.Generator, *, rank: int = 64, scale: float = 1.0) -> Formula:
    """weight * (y + scale * up gelu(down y)), up 0 to begin with. Raises ParseError for a rank below 1."""
    if rank < 1:
        raise ParseError(f"rank is 1 or more, got {rank}", where="adapter")
    narrow = torch.randn(experts, rank, width, generator=generator, dtype=torch.float32) * width**-0.5
    return Formula({"narrow": narrow, "wide": torch.zeros(experts, width, rank, dtype=torch.float32)}, partial(_adapted, scale=scale))


def _adapted(y: Tensor, chosen: Tensor, weights: Tensor, narrow: Tensor, wide: Tensor, *, scale: float) -> Tensor:
    own: Tensor = experts_ffn.op(y, chosen, weights, narrow, None, wide, activation="gelu")
    return y * total(chosen, weights).to(y.dtype) + scale * own


def total(chosen: Tensor, weights: Tensor) -> Tensor:
    """[..., 1]: the weights of a row's experts together."""
    return (weights * (chosen >= 0)).sum(-1, keepdim=True)
