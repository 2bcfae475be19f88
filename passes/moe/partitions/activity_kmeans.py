"""Balanced k-means of the activity: neurons that are active in the same rows make an expert (CMoE, arXiv:2502.04416, section 3)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.moe._balance import clusters, table_of
from sparsify_compiler.passes.moe._evidence import Evidence

STATISTICS = ("rows",)


def activity_kmeans(evidence: Evidence, neurons: Tensor, experts: int, *, share: float = 0.1, rounds: int = 10) -> Tensor:
    """Clusters of the columns of evidence.active(share), 0 or 1 in each row of calibration."""
    points = evidence.active(share)[:, neurons].T.float()
    return table_of(neurons, clusters(points, experts, max(rounds, 1), evidence.generator()), experts)
