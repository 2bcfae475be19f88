"""ERK: Erdős–Rényi kernel (RigL, arXiv:1911.11134, section 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping


def erk(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """Site -> density, proportional to (sum of the weight's dimensions) / (their product), at most 1; small layers keep more.

    The densities, weighted with the number of elements, sum up to `density` exactly. Layers whose share would exceed 1 stay dense and the
    rest is shared out again among the others. Empty weights are dense.
    """
    sizes = {site: math.prod(shape) for site, shape in shapes.items()}
    raw = {site: sum(shape) / sizes[site] for site, shape in shapes.items() if sizes[site]}
    budget = density * sum(sizes.values())
    dense = {site for site in shapes if not sizes[site]}
    while True:
        free = [site for site in raw if site not in dense]
        if not free:
            return dict.fromkeys(shapes, 1.0)
        scale = (budget - sum(sizes[site] for site in dense)) / math.fsum(raw[site] * sizes[site] for site in free)
        over = {site for site in free if scale * raw[site] > 1}
        if not over:
            return {site: 1.0 if site in dense else scale * raw[site] for site in shapes}
        dense |= over
