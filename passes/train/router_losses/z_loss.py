"""Z-loss: scores that stay small (ST-MoE, arXiv:2202.08906, section 3.3)."""

from __future__ import annotations

from torch import Tensor


def z_loss(scores: Tensor, chosen: Tensor) -> Tensor:
    """The mean over the rows of logsumexp(scores)²."""
    return scores.logsumexp(-1).square().mean()
