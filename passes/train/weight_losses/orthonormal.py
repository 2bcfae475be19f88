"""Orthonormal: rows are of length 1 and at right angles (the Identity Loss of PAT, arXiv:2408.14721, for its light operators)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def orthonormal(weights: Sequence[Tensor], kept: int) -> Tensor:
    """sum over the matrices [rows, columns] of the mean of (W Wᵀ - 1)²; a vector is one row."""
    terms = []
    for weight in weights:
        rows = weight.reshape(1, -1) if weight.dim() < 2 else weight.flatten(1)
        terms.append((rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).square().mean())
    return torch.stack(terms).sum()
