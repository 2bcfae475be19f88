"""Importance: the squared variation of how much probability each expert gets (Shazeer et al., arXiv:1701.06538, section 4)."""

from __future__ import annotations

from torch import Tensor


def importance(scores: Tensor, chosen: Tensor) -> Tensor:
    """variance / mean squared, over the experts, of the summed softmax(scores)."""
    total = scores.softmax(-1).flatten(0, -2).sum(0)
    return total.var(correction=0) / total.mean().square().clamp_min(1e-12)
