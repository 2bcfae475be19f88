"""FiLM: each expert scales and shifts what the shared one gives, feature by feature (MoFME, arXiv:2312.16610)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.passes.moe._evidence import Formula


def film(width: int, experts: int, generator: torch.Generator) -> Formula:
    """weight * (scale * y + shift), 1 and 0 to begin with. No kernel: an expert is two vectors."""
    return Formula({"scale": torch.ones(experts, width, dtype=torch.float32), "shift": torch.zeros(experts, width, dtype=torch.float32)}, _modulated)


def _modulated(y: Tensor, chosen: Tensor, weights: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    taken = chosen[..., None] == torch.arange(scale.shape[0], device=y.device)  # no scatter: under autocast weights are of another dtype
    shares = (weights[..., None] * taken).sum(-2).to(scale.dtype)
    return y * (shares @ scale).to(y.dtype) + (shares @ shift).to(y.dtype)
