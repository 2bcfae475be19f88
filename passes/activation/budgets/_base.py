"""What a budget of inputs is given.

A budget is a function `name(costs, density, evidence, *, options...) -> {site: density}` in a file of its own, and a module constant STATISTICS: what
it asks calibration for beside what the scorer does. The densities, weighted with the costs, sum up to `density`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

ROUNDS = 60  # of a bisection, which each halves the interval

Costs = Mapping[str, int]  # site -> weights that all of its inputs together need


class Evidence(Protocol):
    """What is known of each site. It is computed when it is asked for."""

    def scores(self, site: str) -> Tensor:
        """Scores of sampled rows, float32 [rows, K]."""
        ...

    def errors(self, site: str) -> Tensor:
        """||what the layer computes of skipped inputs|| / ||what it computes of all||, at 0, 1 / STEPS, ..., 1 of them skipped: root mean square over
        sampled rows.
        """
        ...

    def block_error(self, densities: Mapping[str, float]) -> float:
        """||what their block gives when these sites select that share of their inputs - what it gives otherwise||, on the first calibration batch.

        The sites lie in one block; blocks are asked about in the order of execution. Raises CalibrationError for a model that is captured in parts.
        """
        ...

    def sensitivity(self, site: str) -> float:
        """Root mean square of the gradient of the loss by an input of the site. Needs the statistic input_gradient."""
        ...

    def block(self, site: str) -> str:
        """The name of the block that the layer lies in; its own path where it lies in none."""
        ...


def by_limit(costs: Costs, density: float, scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Site -> the share of its scores that reach a common limit, such that `density` of all weights is read."""
    total = sum(costs.values())
    ordered = {site: value.flatten().sort().values for site, value in scores.items()}

    def shares(limit: float) -> dict[str, float]:
        return {site: 1 - int(torch.searchsorted(value, limit)) / value.numel() for site, value in ordered.items()}

    low, high = 0.0, max((float(value[-1]) for value in ordered.values()), default=1.0) * 2 + 1e-30
    floor = min((float(value[value > 0][0]) for value in ordered.values() if bool((value > 0).any())), default=high)
    low, high = math.log(floor) - 1, math.log(max(high, floor))
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        found = shares(math.exp(middle))
        spent = math.fsum(costs[site] * share for site, share in found.items())
        low, high = (middle, high) if spent > density * total else (low, middle)
    return {site: max(share, 0.0) for site, share in shares(math.exp(high)).items()}
