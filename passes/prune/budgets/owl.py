"""OWL: blocks with more outliers keep more (Outlier Weighed Layerwise sparsity, arXiv:2310.05175, section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify_compiler.passes.prune.budgets._base import Evidence, Shapes, shifted, sizes_of
from sparsify_compiler.passes.prune.scores._base import along_inputs, magnitudes

STATISTICS: tuple[str, ...] = ("input_norm",)


def owl(shapes: Shapes, density: float, evidence: Evidence, *, outliers: float = 5.0, spread: float = 0.08) -> dict[str, float]:
    """Site -> density, the same within a block: in a window of width 2 * spread, by the share of weights whose |W| * ||x|| is an outlier.

    outliers   M: how many times the mean of the block an outlier exceeds
    spread     lambda: half the difference between the blocks that keep most and least

    The paper sets the window's mean over blocks to the budget; here the mean over weights, which is the same for blocks of one size.
    """
    sizes = sizes_of(shapes)
    blocks: dict[str, list[str]] = {}
    for site in shapes:
        if sizes[site]:
            blocks.setdefault(evidence.block(site), []).append(site)
    shares = {block: _outliers(sites, sizes, evidence, outliers) for block, sites in blocks.items()}
    low, width = min(shares.values(), default=0.0), max(shares.values(), default=0.0) - min(shares.values(), default=0.0)
    wanted = dict.fromkeys(shapes, density)
    for block, sites in blocks.items():
        wanted |= dict.fromkeys(sites, 2 * spread * (shares[block] - low) / width if width else 0.0)
    return shifted(wanted, sizes, density)


def _outliers(sites: list[str], sizes: dict[str, int], evidence: Evidence, times: float) -> float:
    """The share of a block's weights that exceed `times` its mean. The layers are gone through twice, one in memory."""
    size = sum(sizes[site] for site in sites)
    mean = math.fsum(float(_metric(site, evidence).sum(dtype=torch.float64)) for site in sites) / size
    return sum(int((_metric(site, evidence) > times * mean).sum()) for site in sites) / size


def _metric(site: str, evidence: Evidence) -> Tensor:
    weight = evidence.weight(site)
    return magnitudes(weight) * along_inputs(evidence.statistic(site, "input_norm"), weight)
