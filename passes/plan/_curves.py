"""Between the densities that were tried: the logarithm interpolated, without overshooting (Fritsch and Butland's monotone cubic)."""

from __future__ import annotations

import math
from collections.abc import Mapping

LEAST = 1e-12  # of a loss or of seconds: what is below is as good as nothing


def between(at: Mapping[float, float], density: float) -> float:
    """The value at a density, from those at others around it; infinite where one of them is. A single one is taken for all."""
    values = [max(at[place], LEAST) for place in sorted(at)]
    if not all(map(math.isfinite, values)):
        return math.inf
    if len(values) == 1:
        return values[0]
    from scipy.interpolate import PchipInterpolator

    return math.exp(float(PchipInterpolator(sorted(at), [math.log(value) for value in values])(density)))
