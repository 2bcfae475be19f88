"""Curvature: how much the loss rises when a weight goes, by a Fisher matrix that is diagonal over outputs and inputs (arXiv:2312.17244)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsify_compiler.passes.prune.scores._base import along_inputs, along_outputs, magnitudes

STATISTICS: tuple[str, ...] = ("input_norm", "gradient_square")


def curvature(weight: Tensor, statistics: Mapping[str, Tensor], seed: int) -> Tensor:
    """|W[n, k]| * ||x[k]|| * g[n], of the weight's shape: scores of all layers in one unit, fit for a global threshold.

    g[n]^2, the mean square of the loss's gradient at output n, is read off the squared gradients of the row's weights, each over its input's.
    """
    norm = along_inputs(statistics["input_norm"], weight)
    squares = statistics["gradient_square"].to(norm) / norm.square().clamp_min(torch.finfo(norm.dtype).tiny)
    outputs = torch.where(norm > 0, squares, 0).flatten(1).mean(1).sqrt()
    return magnitudes(weight) * norm * along_outputs(outputs, weight)
