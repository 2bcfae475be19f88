"""Outside: the probability that a router leaves on experts that were not chosen; 0 where it makes the choice itself (as COMET's entropy does)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.moe.weights._base import of_chosen


def outside(scores: Tensor, chosen: Tensor) -> Tensor:
    """1 - the sum of softmax(scores) over the chosen, the mean over the rows. A row without a choice counts as 1."""
    return 1 - of_chosen(scores.softmax(-1), chosen.long()).sum(-1).mean()
