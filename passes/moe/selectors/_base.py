"""What selectors of experts share.

A selector is a function `name(scores, number, *, options...) -> chosen` in a file of its own: scores float32 [..., E] of one call, chosen int64
[..., k], -1 for none. `calibrate(scores, share, *, options...) -> number` finds the number on scores [R, E] of calibration such that `share` of the
experts is chosen. Both are plain torch; the first becomes part of the graph. STATISTICS = ("rows",) where the number depends on the scores;
MOVES = True where it is a buffer of the graph, float32 [], that may move while the model is trained (schedule_experts).
"""

from __future__ import annotations

import torch
from torch import Tensor


def places(mask: Tensor) -> Tensor:
    """int64 [..., E]: the number of each expert where the mask says so, else -1."""
    return torch.where(mask, torch.arange(mask.shape[-1], dtype=torch.int64, device=mask.device), -1)
