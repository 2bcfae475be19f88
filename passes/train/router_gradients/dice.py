"""Dice: experts are drawn at random, all alike, and no router learns (THOR, arXiv:2110.04260)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.passes.train.router_gradients._base import shifted


def dice(scores: Tensor, chosen: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """As many experts as were chosen, none twice in a row; weights stay, but for a place that had no expert, which keeps none."""
    drawn = torch.rand_like(scores).argsort(-1)[..., : chosen.shape[-1]]
    return torch.where(chosen < 0, -1, drawn), shifted(weights, torch.zeros_like(chosen, dtype=scores.dtype))
