"""What selectors share.

A selector is a function `name(score, number) -> limit` in a file of its own: score float [..., K] of one call, limit [..., 1] in the same dtype,
which the selected inputs reach; None where the number itself is the limit. `calibrate(scores, density) -> number` finds the number on scores
[rows, K] of calibration. Both are plain torch; the first becomes part of the graph. A module constant EXACT = True says that only zeros are
skipped, so that there is no density to choose.
"""

from __future__ import annotations

from torch import Tensor


def quantile(scores: Tensor, share: float) -> float:
    """The smallest score that lies above `share` of all; 0, which keeps everything, for a share of 0. Scores [rows, K], not empty.

    Scores of 0 cost nothing when they are skipped, so where more than the share are 0, all of them are: ReLU's zeros.
    """
    flat = scores.flatten()
    below = round(share * flat.numel())
    if below < 1:
        return 0.0
    found = float(flat.kthvalue(min(below + 1, flat.numel())).values)
    return found if found or not bool((flat > 0).any()) else float(flat[flat > 0].min())


def count_of(scores: Tensor, density: float) -> int:
    """How many of K inputs make a density: at least one."""
    width = int(scores.shape[-1])
    return min(max(1, round(density * width)), width)
