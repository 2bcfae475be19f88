"""What a quality budget is held on: batches that nothing was fitted to, and what chance may add to what is lost there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

Batch = TypeVar("Batch")
EVERY = 4  # how many-th of the batches is held out
CONFIDENCE = 0.9  # of the bound on what is lost


def split(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(batches to calibrate on, batches to measure on): every EVERY-th is held out, two of three to seven, one of two; a single one is both."""
    count = len(batches)
    if count < 2:
        return list(batches), list(batches)
    wanted = max(count // EVERY, 2 if count > 2 else 1)
    held = {(place + 1) * count // wanted - 1 for place in range(wanted)}
    return [one for i, one in enumerate(batches) if i not in held], [one for i, one in enumerate(batches) if i in held]


def upper(values: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted mean, and above it what other batches of the kind stay below with CONFIDENCE: Student's t times the error of the mean.

    Of one value that value. NaN where one of them is.
    """
    total = math.fsum(weights)
    mean = math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / total
    count = len(values)
    if count < 2:
        return mean
    from scipy.stats import t

    spread = math.fsum((weight * (value - mean)) ** 2 for value, weight in zip(values, weights, strict=True))
    return mean + float(t.ppf(CONFIDENCE, count - 1)) * math.sqrt(spread * count / (count - 1)) / total
