"""Curvature: one limit for what the loss would lose by each weight, over all layers, drawn towards an equal share (arXiv:2312.17244, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsify_compiler.errors import BudgetError
from sparsify_compiler.passes.prune.budgets._base import Evidence, Shapes
from sparsify_compiler.passes.prune.budgets.global_threshold import global_threshold
from sparsify_compiler.passes.prune.scores.curvature import STATISTICS as STATISTICS
from sparsify_compiler.passes.prune.scores.curvature import curvature as score


def curvature(shapes: Shapes, density: float, evidence: Evidence, *, mix: float = 0.6) -> dict[str, float]:
    """Site -> density: mix * (that of a global threshold of the score `curvature`) + (1 - mix) * density.

    The loss is the model's own on the calibration batches (see calibrate), whatever the pass itself compares within a layer. The threshold alone
    would leave some layers next to nothing, where the second order that it is computed to says little any more.

    Raises BudgetError for a mix that does not lie between 0 and 1.
    """
    if not 0 <= mix <= 1:
        raise BudgetError(f"mix lies between 0 and 1, got {mix}", where="budget curvature")
    found = global_threshold(shapes, density, _Scored(evidence))
    real = {site for site in shapes if all(shapes[site])}
    return {site: mix * share + (1 - mix) * density if site in real else share for site, share in found.items()}


@dataclass(frozen=True)
class _Scored:
    """The evidence of another, with a score of our own."""

    evidence: Evidence

    def score(self, site: str) -> Tensor:
        return score(self.weight(site), {name: self.statistic(site, name) for name in STATISTICS}, 0)

    def weight(self, site: str) -> Tensor:
        return self.evidence.weight(site)

    def statistic(self, site: str, name: str) -> Tensor:
        return self.evidence.statistic(site, name)

    def block(self, site: str) -> str:
        return self.evidence.block(site)
