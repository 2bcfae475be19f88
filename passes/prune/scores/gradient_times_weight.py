"""Gradient times weight: how much the loss changes when a weight goes (SNIP, arXiv:1810.02340, equation 4)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sparsify_compiler.passes.prune.scores._base import magnitudes

STATISTICS: tuple[str, ...] = ("gradient",)


def gradient_times_weight(weight: Tensor, statistics: Mapping[str, Tensor], seed: int) -> Tensor:
    """|g * W|, of the weight's shape; g is the gradient of the loss, summed over the batches.

    SNIP divides by the sum over all weights of the model, which changes no order.
    """
    return magnitudes(weight) * statistics["gradient"].to(weight.device).abs()
