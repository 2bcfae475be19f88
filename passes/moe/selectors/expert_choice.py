"""Expert choice: each expert takes the rows that it scores highest in (Zhou et al., arXiv:2202.09368). Not causal: a token depends on later ones."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.passes.moe.selectors._base import places


def expert_choice(scores: Tensor, number: float) -> Tensor:
    """Of the rows of one text, the last dimension but one, each expert takes the `number` of highest score: a share, at least one.

    A row alone is taken by all experts, as when a language model decodes: this is for encoders.
    """
    rank = scores.argsort(dim=-2, descending=True, stable=True).argsort(-2)
    return places(rank < (torch.ones_like(scores).sum(-2, keepdim=True) * number).round().clamp_min(1))


def calibrate(scores: Tensor, share: float) -> float:
    """The share itself: no expert is chosen more often than another."""
    return share
