"""Top-k: the k experts of highest score (Shazeer et al., arXiv:1701.06538)."""

from __future__ import annotations

from torch import Tensor


def top_k(scores: Tensor, number: float, *, k: int = 0) -> Tensor:
    """k experts, as many as there are at most; 0 for the calibrated number."""
    return scores.topk(min(k or int(number), scores.shape[-1]), -1).indices


def calibrate(scores: Tensor, share: float, *, k: int = 0) -> float:
    """As many as make the share, at least one."""
    return max(1, round(share * scores.shape[-1]))
