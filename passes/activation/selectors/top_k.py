"""Top-k: the same number of inputs in every row, the k of highest score (Q-Sparse, arXiv:2407.10969; The Lazy Neuron, arXiv:2210.06313)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.activation.selectors._base import count_of


def top_k(score: Tensor, number: float) -> Tensor:
    """The number-th largest score of a row; inputs that tie with it are selected too."""
    return score.topk(int(number), dim=-1).values[..., -1:]


def calibrate(scores: Tensor, density: float) -> float:
    """k = density * K, at least one."""
    return float(count_of(scores, density))
