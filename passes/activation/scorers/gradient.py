"""Gradient: |x| times the usual size of the loss's gradient by it, so that the square is what the loss loses, to second order and on average."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

STATISTICS: tuple[str, ...] = ("input_gradient",)


def gradient(weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
    """||dL/dx[k]|| over the rows of calibration, float32 [K]: the diagonal of the empirical Fisher matrix of the layer's inputs."""
    return statistics["input_gradient"].float()
