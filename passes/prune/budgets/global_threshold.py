"""Global threshold: one limit for the scores of all layers (Han et al., arXiv:1506.02626; The Lottery Ticket Hypothesis, arXiv:1803.03635)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.prune.budgets._base import Evidence, Shapes, sizes_of
from sparsify_compiler.passes.prune.structures._base import SLACK

STATISTICS: tuple[str, ...] = ()
HALF = 16  # bits of a float32 that one walk over the layers sorts by


def global_threshold(shapes: Shapes, density: float, evidence: Evidence) -> dict[str, float]:
    """Site -> density: the layer's share of the ceil(density * total) weights that score highest over all layers.

    Exact for an unstructured mask, ties included (of equal scores the first go first), except that every layer keeps one weight at least: what
    such a layer takes, the layers with most weights pay. The scores are walked over twice, layer by layer, and never held together.
    """
    sizes = sizes_of(shapes)
    sites = [site for site in shapes if sizes[site]]
    wanted = min(sum(sizes.values()), max(math.ceil(density * sum(sizes.values()) - SLACK), len(sites)))
    high = {site: torch.bincount((_order(site, evidence) >> HALF) + (1 << 15), minlength=1 << 16) for site in sites}
    upper, rest = _crossing(sum(high.values(), torch.zeros(1 << 16, dtype=torch.long)), wanted)
    low = {site: _lower(site, evidence, upper - (1 << 15)) for site in sites}
    lower, ties = _crossing(sum(low.values(), torch.zeros(1 << HALF, dtype=torch.long)), rest)
    counts = {site: int(high[site][upper + 1:].sum()) + int(low[site][lower + 1:].sum()) for site in sites}
    for site in reversed(sites):
        given = min(ties, int(low[site][lower]))
        counts[site], ties = counts[site] + given, ties - given
    return {site: 1.0 for site in shapes if site not in counts} | {s: n / sizes[s] for s, n in _at_least_one(counts).items()}


def _order(site: str, evidence: Evidence) -> Tensor:
    """int64, flat: the scores as whole numbers that sort as they do, in [-2^31, 2^31)."""
    score = evidence.score(site).detach().reshape(-1).float() + 0.0  # -0.0 becomes 0.0
    if bool(score.isnan().any()):
        raise StructureError("the score holds NaN", where=site, hint="the weights or the calibration statistics are not finite")
    bits = score.contiguous().view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).cpu().long()


def _lower(site: str, evidence: Evidence, upper: int) -> Tensor:
    """How many scores with these upper bits have which lower bits."""
    order = _order(site, evidence)
    return torch.bincount(order[order >> HALF == upper] & ((1 << HALF) - 1), minlength=1 << HALF)


def _crossing(histogram: Tensor, wanted: int) -> tuple[int, int]:
    """(bin, rest): counted from the top, all bins above `bin` are wanted, and `rest` of its own."""
    above = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, torch.tensor(max(wanted, 1))).clamp(max=len(histogram) - 1))
    taken = int(above[place - 1]) if place else 0
    return len(histogram) - 1 - place, wanted - taken


def _at_least_one(counts: dict[str, int]) -> dict[str, int]:
    """One weight for each layer that has none, taken one by one from the layer that then has most."""
    for site in [site for site, count in counts.items() if count == 0]:
        counts[max(counts, key=counts.__getitem__)] -= 1
        counts[site] = 1
    return counts
