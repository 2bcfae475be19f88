"""What calibration can know about a site: one entry a statistic, each a sum that grows batch by batch in bounded memory.

Most are about the site's input; `of` says where another one looks.

The input is seen as rows of `width` channels (a convolution's as one row a pixel). All rows count alike, also those of padded tokens: the
model's attention mask does not reach the layers. Give batches of full sentences, or trim them, where that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SKETCH_BITS = 17  # of a float32 magnitude that the sketch drops: 6 bits of fraction remain, so a quantile is right to 0.8 %
SKETCH_BINS = 1 << (31 - SKETCH_BITS)
SAMPLE_ROWS = 256  # of the statistic input_rows: some 100,000 numbers of a layer, which say a quantile of them to 0.2 %


@dataclass(frozen=True)
class Statistic:
    """How one statistic is gathered.

    start   width -> the empty sum
    add     takes the sum and float32 rows [rows, width] (float64 for a float64 model); changes the sum in place
    finish  the sum and the number of rows -> the statistic
    size    width -> bytes of the sum
    of      "input": the rows are the site's input.
            "hidden": the input of the FFN's down projection, for the sites that make it, up and gate; other sites get the empty sum of width 0.
            "block": `add` takes two sets of rows, the residual stream before and after the block that the site lies in; other sites get
            the statistic of no rows.
            "gradient": `add` takes the gradient of the loss by the site's weight and the weight, both flat, once a batch; width is the number of
            weights, and the statistic has the weight's shape.
            "neurons": the rows are what the FFN's activation gives, for the site of its down projection; other sites get the empty sum of width 0.
            "partner": the rows are what the neurons of a gated FFN are multiplied with, likewise
            "input gradient": the rows are the gradient of the loss by what the site reads, through this site alone
            "output gradient": the rows are the gradient of the loss by what the site gives, before anything follows it
    """

    start: Callable[[int], Tensor]
    add: Callable[..., object]
    finish: Callable[[Tensor, int], Tensor]
    size: Callable[[int], int]
    of: Literal["input", "hidden", "block", "gradient", "input gradient", "output gradient", "neurons", "partner"] = "input"


def _doubles(width: int) -> Tensor:
    return torch.zeros(width, dtype=torch.float64)


def _add_squares(total: Tensor, rows: Tensor) -> None:
    total += rows.square().sum(0, dtype=torch.float64).to(total.device)


def _add_moments(total: Tensor, rows: Tensor) -> None:
    total[0] += rows.sum(0, dtype=torch.float64).to(total.device)
    total[1] += rows.double().square().sum(0).to(total.device)


def _variance(total: Tensor, rows: int) -> Tensor:
    means = total / max(rows, 1)
    return (means[1] - means[0].square()).clamp_min(0)


def _add_absmax(total: Tensor, rows: Tensor) -> None:
    if rows.shape[0]:
        total.copy_(torch.maximum(total, rows.abs().amax(0).to(total)))


def _add_sketch(total: Tensor, rows: Tensor) -> None:
    bins = rows.abs().float().contiguous().view(torch.int32) >> SKETCH_BITS
    total += torch.bincount(bins.reshape(-1), minlength=SKETCH_BINS).to(total.device)


def _add_gram(total: Tensor, rows: Tensor) -> None:
    total.addmm_(rows.T.to(total), rows.to(total))


def _add_angles(total: Tensor, before: Tensor, after: Tensor) -> None:
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=1, eps=1e-30)
    total += (cosine.clamp(-1, 1).arccos().sum() / torch.pi).to(total.device)


def _add_gradient(total: Tensor, gradient: Tensor, weight: Tensor) -> None:
    total += gradient.to(total)


def _add_gradient_squares(total: Tensor, gradient: Tensor, weight: Tensor) -> None:
    total += gradient.to(total).square()


def _add_movement(total: Tensor, gradient: Tensor, weight: Tensor) -> None:
    total -= gradient.to(total) * weight.to(total)


def _start_sample(width: int) -> Tensor:
    """[SAMPLE_ROWS + 1, width + 3]: the rows, and behind them in the last one how many are kept, every how many-th is, and how many were seen."""
    sample = torch.zeros(SAMPLE_ROWS + 1, width + 3, dtype=torch.float32)
    sample[-1, -2] = 1
    return sample


def _add_sample(total: Tensor, rows: Tensor) -> None:
    """Keep every step-th row; when there is no more room, drop every second and double the step."""
    kept, step, seen = (int(number) for number in total[-1, -3:])
    taken = rows[-seen % step :: step].to(total)
    while kept + taken.shape[0] > SAMPLE_ROWS:
        both = torch.cat([total[:kept, :-3], taken])[::2]  # the first row that was kept is the first that was seen
        step *= 2
        kept, taken = 0, both
    total[kept : kept + taken.shape[0], :-3] = taken
    total[-1, -3:] = torch.tensor([kept + taken.shape[0], step, seen + rows.shape[0]])


def _sampled(total: Tensor, rows: int) -> Tensor:
    return total[: int(total[-1, -3]), :-3].clone()


def _floats(width: int) -> Tensor:
    return torch.zeros(width, dtype=torch.float32)


STATISTICS: Mapping[str, Statistic] = {
    # float32 [width]: L2 norm of each channel over all rows
    "input_norm": Statistic(_doubles, _add_squares, lambda s, n: s.sqrt().float(), lambda w: 8 * w),
    # float32 [width]: mean of each channel
    "input_mean": Statistic(_doubles, lambda s, x: s.add_(x.sum(0, dtype=torch.float64).to(s)), lambda s, n: (s / n).float(), lambda w: 8 * w),
    # float64 [width]: variance of each channel over all rows
    "input_variance": Statistic(lambda w: torch.zeros(2, w, dtype=torch.float64), _add_moments, _variance, lambda w: 16 * w),
    # float32 [width]: largest magnitude of each channel
    "absmax": Statistic(lambda w: torch.zeros(w, dtype=torch.float32), _add_absmax, lambda s, n: s, lambda w: 4 * w),
    # float32 [width, width]: X^T X, summed over the rows
    "gram": Statistic(lambda w: torch.zeros(w, w, dtype=torch.float32), _add_gram, lambda s, n: s, lambda w: 4 * w * w),
    # int64 [SKETCH_BINS]: how many magnitudes fall into each bin of the float line; read it with `quantile`
    "quantiles": Statistic(lambda w: torch.zeros(SKETCH_BINS, dtype=torch.int64), _add_sketch, lambda s, n: s, lambda w: 8 * SKETCH_BINS),
    # float32 [up to SAMPLE_ROWS, width]: rows at even distances over all that were seen
    "input_rows": Statistic(_start_sample, _add_sample, _sampled, lambda w: 4 * (SAMPLE_ROWS + 1) * (w + 3)),
    "neuron_rows": Statistic(_start_sample, _add_sample, _sampled, lambda w: 4 * (SAMPLE_ROWS + 1) * (w + 3), "neurons"),
    # float32 [hidden]: mean magnitude of what each neuron of a gated FFN is multiplied with; [0] for other sites
    "partner_mean": Statistic(_doubles, lambda s, x: s.add_(x.abs().sum(0, dtype=torch.float64).to(s)), lambda s, n: (s / max(n, 1)).float(),
                              lambda w: 8 * w, "partner"),
    # float32 [width]: root of the summed squares of the gradient of the loss by each input channel, through this site alone
    "input_gradient": Statistic(_doubles, _add_squares, lambda s, n: s.sqrt().float(), lambda w: 8 * w, "input gradient"),
    # float32 [outputs]: mean over all rows of the squared gradient of the loss by each output channel
    "output_gradient": Statistic(_doubles, _add_squares, lambda s, n: (s / max(n, 1)).float(), lambda w: 8 * w, "output gradient"),
    # int64 []: number of rows seen
    "samples": Statistic(lambda w: torch.zeros((), dtype=torch.int64), lambda s, x: s.add_(x.shape[0]), lambda s, n: s, lambda w: 8),
    # float32 [hidden]: L2 norm of each hidden channel of the FFN that up and gate make; [0] for other sites
    "hidden_norm": Statistic(_doubles, _add_squares, lambda s, n: s.sqrt().float(), lambda w: 8 * w, "hidden"),
    # float32 []: mean angle between the residual stream before and after the block, in units of pi; 0 for a site in no block
    "block_angle": Statistic(lambda w: torch.zeros((), dtype=torch.float64), _add_angles, lambda s, n: (s / max(n, 1)).float(), lambda w: 8, "block"),
    # float32 [the weight's shape]: the gradient of the loss by the weight, and its square, summed over the batches
    "gradient": Statistic(_floats, _add_gradient, lambda s, n: s, lambda w: 4 * w, "gradient"),
    "gradient_square": Statistic(_floats, _add_gradient_squares, lambda s, n: s, lambda w: 4 * w, "gradient"),
    # float32 [the weight's shape]: by how much gradient descent moves the weight away from zero, -g * W, summed over the batches. What a
    # movement.Movement has summed up in training takes its place where it is given
    "movement": Statistic(_floats, _add_movement, lambda s, n: s, lambda w: 4 * w, "gradient"),
}


def quantile(sketch: Tensor, share: float) -> float:
    """The magnitude below which `share` (0 to 1) of all magnitudes lie, from the statistic "quantiles"; right to 0.8 %."""
    counts = sketch.cumsum(0)
    wanted = share * int(counts[-1])
    place = int(torch.searchsorted(counts.double(), torch.tensor(wanted, dtype=torch.float64)).clamp(max=SKETCH_BINS - 1))
    edges = (torch.tensor([place, place + 1], dtype=torch.int32) << SKETCH_BITS).view(torch.float32)
    return 0.0 if place == 0 else float(edges.mean())
