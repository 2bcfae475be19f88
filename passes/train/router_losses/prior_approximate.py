"""Prior-approximate: routers are to choose the experts that matter most in a row by now, as the oracle would (FactorLLM, arXiv:2408.11855)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.passes.train._experts import WatchedExperts

STATISTICS = ("experts",)


def prior_approximate(scores: Tensor, chosen: Tensor, experts: WatchedExperts, *, criterion: str = "output", rows: int = 256) -> Tensor:
    """Cross entropy of softmax(scores) with equal odds for the best experts of a row, as many as are chosen, on about `rows` rows.

    Every expert is computed for these rows, without gradients. For scores of any scale, where agreement is for those that are importances. The
    paper's best experts are those whose output is the nearest to the dense one's share; here criterion says which they are, as in split_experts.
    """
    flat = scores.flatten(0, -2)
    every = max(1, flat.shape[0] // rows)
    wanted = experts.importance(criterion, every)
    best = wanted.topk(min(chosen.shape[-1], wanted.shape[1]), -1).indices
    count = (chosen >= 0).flatten(0, -2)[::every].sum(-1, keepdim=True).clamp(max=best.shape[-1])
    odds = flat[::every].log_softmax(-1).gather(-1, best) * (torch.arange(best.shape[-1], device=best.device) < count)
    return -(odds / count.clamp_min(1)).sum(-1).mean() if best.numel() else torch.zeros_like(flat.sum())
