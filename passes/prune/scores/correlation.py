"""Correlation: inputs and outputs that go together ought to be connected (Hebb's rule, for growth in training; G2GNet, arXiv:2508.14140)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

STATISTICS: tuple[str, ...] = ("correlation",)


def correlation(weight: Tensor, statistics: Mapping[str, Tensor], seed: int) -> Tensor:
    """|r|, float32 [out, in], of each input and what the layer gives at each output, over the rows of a training step; see move_masks()."""
    return statistics["correlation"].to(weight.device).abs()
