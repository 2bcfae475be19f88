"""What an allocator of a budget is given, and how a total is kept while densities are clamped.

An allocator is a function `name(shapes, density, evidence, *, options...) -> {site: density}` in a file of its own, and a module constant
STATISTICS: the calibration statistics that it asks its evidence for. The densities, weighted with the sizes, sum up to `density` exactly, unless they
are options of the budget's own (see `told`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

ROUNDS = 200  # of the bisection below: each halves the interval, and a float64 has 64 bits

Shapes = Mapping[str, tuple[int, ...]]


class Evidence(Protocol):
    """What is known of each layer. All of it is computed when it is asked for, and nothing is kept: ask layer by layer."""

    def score(self, site: str) -> Tensor:
        """The score of the pass, float, of the weight's shape."""
        ...

    def weight(self, site: str) -> Tensor:
        """The weight itself, any float dtype. Not to be changed."""
        ...

    def statistic(self, site: str, name: str) -> Tensor:
        """A calibration statistic that STATISTICS names. Raises CalibrationError where nothing was gathered."""
        ...

    def block(self, site: str) -> str:
        """The name of the block that the layer lies in (attention and FFN of one transformer layer); its own path where it lies in none."""
        ...


def sizes_of(shapes: Shapes) -> dict[str, int]:
    """Site -> number of weights."""
    return {site: math.prod(shape) for site, shape in shapes.items()}


def shifted(wanted: Mapping[str, float], sizes: Mapping[str, int], density: float) -> dict[str, float]:
    """The wanted densities plus one number, the same for all, clamped between one weight and all, such that the total is `density` exactly.

    A layer that wants more never gets less. Empty layers are dense.
    """
    real = [site for site in wanted if sizes[site]]
    if not real:
        return dict.fromkeys(wanted, 1.0)
    total = density * sum(sizes[site] for site in real)

    def moved(by: float) -> dict[str, float]:
        return {site: min(max(wanted[site] + by, 1 / sizes[site]), 1.0) for site in real}

    low, high = -max(wanted[site] for site in real), 1 - min(wanted[site] for site in real)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if _spent(moved(middle), sizes) < total else (low, middle)
    found = moved(high)
    free = [site for site in real if 1 / sizes[site] < found[site] < 1]
    rest = (total - _spent(found, sizes)) / sum(sizes[site] for site in free) if free else 0.0  # the last bit that bisection leaves
    return {site: found[site] + rest if site in free else found.get(site, 1.0) for site in wanted}


def scaled(wanted: Mapping[str, float], sizes: Mapping[str, int], density: float) -> dict[str, float]:
    """Densities in proportion to the wanted ones (all above 0), such that the total is `density` exactly.

    Layers whose share would exceed 1 stay dense, and the rest is shared out again among the others. Empty layers are dense.
    """
    total = density * sum(sizes.values())
    dense = {site for site in wanted if not sizes[site]}
    while True:
        free = [site for site in wanted if site not in dense]
        if not free:
            return dict.fromkeys(wanted, 1.0)
        scale = (total - sum(sizes[site] for site in dense)) / math.fsum(wanted[site] * sizes[site] for site in free)
        over = {site for site in free if scale * wanted[site] > 1}
        if not over:
            return {site: 1.0 if site in dense else scale * wanted[site] for site in wanted}
        dense |= over


def _spent(densities: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    return math.fsum(sizes[site] * density for site, density in densities.items())


def told(options: Mapping[str, object]) -> float | None:
    """The mean of the densities that a budget's options tell layer by layer (budget "given"); None for one that shares out a total."""
    densities = options.get("densities")
    return math.fsum(densities.values()) / len(densities) if isinstance(densities, Mapping) and densities else None
