"""What selectors share.

A selector is a function `name(score, number) -> limit` in a file of its own: score float [..., K] of one call, limit [..., 1] in the same dtype,
which the selected inputs reach; None where the number itself is the limit. `calibrate(scores, density) -> number` finds the number on scores
[rows, K] of calibration. Both are plain torch; the first becomes part of the graph. A module constant EXACT = True says that only zeros are
skipped, so that there is no density to choose.
"""

from __future__ import annotations

from torch import Tensor


def quantile(scores: Tensor, share: float) -> float:
    """The smallest score that lies above `share` of all; 0, which keeps everything, for a share of 0. Scores [rows, K], not empty."""
    flat = scores.flatten()
    below = round(share * flat.numel())
    return 0.0 if below < 1 else float(flat.kthvalue(min(below + 1, flat.numel())).values)


def count_of(scores: Tensor, density: float) -> int:
    """How many of K inputs make a density: at least one."""
    width = int(scores.shape[-1])
    return min(max(1, round(density * width)), width)
