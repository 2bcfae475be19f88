"""Bias correction: what the cut weights gave on average goes into the bias (arXiv:1906.04721, section 4.2, for cut instead of rounded weights)."""

from __future__ import annotations

from sparsify_compiler.passes.prune.repairs._base import Cut, Repaired

STATISTICS: tuple[str, ...] = ("patch_mean",)
CHOOSES = False


def bias(cut: Cut) -> Repaired:
    """Bias + (W - W * mask) mean(x): the mean of every output is what it was."""
    mask = cut.given_mask()
    return Repaired(cut.weight * mask, mask, cut.weight.masked_fill(mask, 0) @ cut.statistics["patch_mean"].to(cut.weight))
