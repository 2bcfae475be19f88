"""What calibration can know about a site's input: one entry a statistic, each a sum that grows batch by batch in bounded memory.

The input is seen as rows of `width` channels (a convolution's as one row a pixel). All rows count alike, also those of padded tokens: the
model's attention mask does not reach the layers. Give batches of full sentences, or trim them, where that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SKETCH_BITS = 17  # of a float32 magnitude that the sketch drops: 6 bits of fraction remain, so a quantile is right to 0.8 %
SKETCH_BINS = 1 << (31 - SKETCH_BITS)


@dataclass(frozen=True)
class Statistic:
    """How one statistic is gathered.

    start   width -> the empty sum
    add     takes the sum and float32 rows [rows, width] (float64 for a float64 model); changes the sum in place
    finish  the sum and the number of rows -> the statistic
    size    width -> bytes of the sum
    """

    start: Callable[[int], Tensor]
    add: Callable[[Tensor, Tensor], object]
    finish: Callable[[Tensor, int], Tensor]
    size: Callable[[int], int]


def _doubles(width: int) -> Tensor:
    return torch.zeros(width, dtype=torch.float64)


def _add_squares(total: Tensor, rows: Tensor) -> None:
    total += rows.square().sum(0, dtype=torch.float64).to(total.device)


def _add_absmax(total: Tensor, rows: Tensor) -> None:
    if rows.shape[0]:
        total.copy_(torch.maximum(total, rows.abs().amax(0).to(total)))


def _add_sketch(total: Tensor, rows: Tensor) -> None:
    bins = rows.abs().float().contiguous().view(torch.int32) >> SKETCH_BITS
    total += torch.bincount(bins.reshape(-1), minlength=SKETCH_BINS).to(total.device)


def _add_gram(total: Tensor, rows: Tensor) -> None:
    total.addmm_(rows.T.to(total), rows.to(total))


STATISTICS: Mapping[str, Statistic] = {
    # float32 [width]: L2 norm of each channel over all rows
    "input_norm": Statistic(_doubles, _add_squares, lambda s, n: s.sqrt().float(), lambda w: 8 * w),
    # float32 [width]: mean of each channel
    "input_mean": Statistic(_doubles, lambda s, x: s.add_(x.sum(0, dtype=torch.float64).to(s)), lambda s, n: (s / n).float(), lambda w: 8 * w),
    # float32 [width]: largest magnitude of each channel
    "absmax": Statistic(lambda w: torch.zeros(w, dtype=torch.float32), _add_absmax, lambda s, n: s, lambda w: 4 * w),
    # float32 [width, width]: X^T X, summed over the rows
    "gram": Statistic(lambda w: torch.zeros(w, w, dtype=torch.float32), _add_gram, lambda s, n: s, lambda w: 4 * w * w),
    # int64 [SKETCH_BINS]: how many magnitudes fall into each bin of the float line; read it with `quantile`
    "quantiles": Statistic(lambda w: torch.zeros(SKETCH_BINS, dtype=torch.int64), _add_sketch, lambda s, n: s, lambda w: 8 * SKETCH_BINS),
    # int64 []: number of rows seen
    "samples": Statistic(lambda w: torch.zeros((), dtype=torch.int64), lambda s, x: s.add_(x.shape[0]), lambda s, n: s, lambda w: 8),
}


def quantile(sketch: Tensor, share: float) -> float:
    """The magnitude below which `share` (0 to 1) of all magnitudes lie, from the statistic "quantiles"; right to 0.8 %."""
    counts = sketch.cumsum(0)
    wanted = share * int(counts[-1])
    place = int(torch.searchsorted(counts.double(), torch.tensor(wanted, dtype=torch.float64)).clamp(max=SKETCH_BINS - 1))
    edges = (torch.tensor([place, place + 1], dtype=torch.int32) << SKETCH_BITS).view(torch.float32)
    return 0.0 if place == 0 else float(edges.mean())
