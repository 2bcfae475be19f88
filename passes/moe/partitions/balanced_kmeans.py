"""Balanced k-means of the weights: neurons that read alike make an expert (MoEfication, arXiv:2110.01786, section 3.2)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.moe._balance import clusters, table_of
from sparsify_compiler.passes.moe._evidence import Evidence


def balanced_kmeans(evidence: Evidence, neurons: Tensor, experts: int, *, rounds: int = 10) -> Tensor:
    """Clusters of the rows of the weight that the activation reads: gate where there is one."""
    return table_of(neurons, clusters(evidence.ffn.gate[neurons], experts, max(rounds, 1), evidence.generator()), experts)
