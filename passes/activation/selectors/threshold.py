"""Threshold: one calibrated number for all rows, so that rows of large activations keep more (TEAL, arXiv:2408.14690; CATS, arXiv:2404.08763)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.activation.selectors._base import quantile


def threshold(score: Tensor, number: float) -> None:
    """The number itself is the limit: nothing is to be computed of the scores of a row."""
    return


def calibrate(scores: Tensor, density: float) -> float:
    """The score that `density` of all sampled scores [rows, K] reach."""
    return quantile(scores, 1 - density)
