"""What routers share.

A router is a function `name(task, *, options...) -> Formula` in a file of its own, whose formula takes `x` [..., K], what the FFN reads, and gives
scores float32 [..., E], the higher the more the expert matters. STATISTICS says what it needs of calibration, as in partitions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.passes.moe._evidence import Evidence


@dataclass(frozen=True)
class Task:
    """What a router is to do. table int64 [E, S]: the neurons of each expert, -1 for none; share: of the experts that are to be chosen.

    wanted     float32 [R, E]: how much each expert matters in the rows of calibration; R is 0 for routers that need no rows
    criterion  what that was measured by: a name of _criteria.CRITERIA
    """

    evidence: Evidence
    table: Tensor
    share: float
    wanted: Tensor
    criterion: str

    @property
    def experts(self) -> int:
        """E."""
        return self.table.shape[0]


def scored(x: Tensor, weight: Tensor, offset: Tensor | None = None) -> Tensor:
    """weight x + offset, in float32."""
    scores: Tensor = linear(x, weight, offset)
    return scores.float()


def normal(shape: tuple[int, ...], evidence: Evidence) -> Tensor:
    """Random numbers of variance 1 / the last size, by the seed."""
    return torch.randn(shape, generator=evidence.generator(), dtype=torch.float32) / math.sqrt(shape[-1])
