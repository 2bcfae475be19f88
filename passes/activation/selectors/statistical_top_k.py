"""Statistical top-k: mean + z * standard deviation of a row's scores, in linear time and without sorting (Spark Transformer, arXiv:2506.06644)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.activation.selectors._base import quantile


def statistical_top_k(score: Tensor, number: float) -> Tensor:
    """mean + number * standard deviation, over the K scores of a row."""
    mean = score.mean(-1, keepdim=True)
    return mean + number * (score - mean).square().mean(-1, keepdim=True).sqrt()


def calibrate(scores: Tensor, density: float) -> float:
    """z such that `density` of the sampled scores, each measured in its own row's mean and deviation, exceed it.

    The paper takes the quantile of a normal distribution, which scores after training with its loss follow; without training they do not.
    """
    mean = scores.mean(-1, keepdim=True)
    deviation = (scores - mean).square().mean(-1, keepdim=True).sqrt()
    z = (scores - mean) / deviation.clamp_min(1e-30)
    return quantile(z - z.min(), 1 - density) + float(z.min())
