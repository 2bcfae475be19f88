"""What a repair of skipped inputs is given, and gives.

A repair is a function `name(skipping, density, *, options...) -> Repaired` in a file of its own. What it makes of the inputs that are not selected is
read in every row, so it is paid for out of the layer's density.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Skipping:
    """One layer.

    weight   [N, K]
    skipped  density -> x - select(x) of sampled rows x, float32 [rows, K], for a selection that takes that share of all inputs
    """

    weight: Tensor
    skipped: Callable[[float], Tensor]


@dataclass(frozen=True)
class Repaired:
    """density: of the inputs, what the repair leaves of it. low_rank: reads [r, K] and writes [N, r], of what is skipped; None for nothing."""

    density: float
    low_rank: tuple[Tensor, Tensor] | None = None
