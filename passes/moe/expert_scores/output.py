"""Output: the length of what an expert adds to the rows that chose it (REAP, Lasby et al., arXiv:2510.13999, section 4)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.moe._observed import Observed


def output(evidence: Observed, *, mean: bool = True) -> Tensor:
    """weight * ||expert(x)||, on average over the rows that chose it; mean=False: the sum over them, in which also counts how many they are."""
    total = evidence.summed(evidence.weights.abs() * evidence.lengths)
    return total / evidence.times.clamp_min(1) if mean else total
