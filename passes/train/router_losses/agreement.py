"""Agreement: scores follow how much each expert matters in a row by now, as the oracle router measures it (after FactorLLM, arXiv:2408.11855)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.train._experts import WatchedExperts

STATISTICS = ("experts",)


def agreement(scores: Tensor, chosen: Tensor, experts: WatchedExperts, *, criterion: str = "output", rows: int = 256) -> Tensor:
    """|scores - importance|² over what the mean importance of each expert leaves of it, on about `rows` rows: 1 for a router that knows no row.

    0 for one row alone, which has nothing to be measured against. Every expert is computed for these rows, without gradients. For routers whose
    scores are importances: "ridge" begins so.
    """
    flat = scores.flatten(0, -2)
    every = max(1, flat.shape[0] // rows)
    wanted = experts.importance(criterion, every)
    if wanted.shape[0] < 2:
        return scores.sum() * 0
    error = (flat[::every, : wanted.shape[1]] - wanted).square().sum()
    return error / (wanted - wanted.mean(0)).square().sum().clamp_min(1e-12)
