"""Gradient: where the loss falls fastest (RigL, arXiv:1911.11134, section 3, for weights that are zero)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

STATISTICS: tuple[str, ...] = ("gradient",)


def gradient(weight: Tensor, statistics: Mapping[str, Tensor], seed: int) -> Tensor:
    """|g|, float32 (float64 for float64), of the weight's shape; g is the gradient of the loss, summed over the batches."""
    found = statistics["gradient"].to(weight.device).abs()
    return found if found.dtype.itemsize >= 4 else found.float()
