"""Sensitivity: one limit, over all layers, of what the loss loses by an input for each weight that skipping it saves."""

from __future__ import annotations

import math

from sparsify_compiler.passes.activation.budgets._base import Costs, Evidence, by_limit

STATISTICS: tuple[str, ...] = ("input_gradient",)


def sensitivity(costs: Costs, density: float, evidence: Evidence, *, weighted: bool = False) -> dict[str, float]:
    """Site -> density. An input costs as many weights as the layer has outputs; the loss loses the square of its score, so the score is divided by
    the root of that number.

    weighted  the scores are in units of the loss already (scorer "gradient"); otherwise each layer's are multiplied with the root mean square of
              the gradient by its inputs
    """
    found = {}
    for site, cost in costs.items():
        scores = evidence.scores(site)
        unit = 1.0 if weighted else evidence.sensitivity(site)
        found[site] = scores * (unit / math.sqrt(max(cost / max(scores.shape[-1], 1), 1)))
    return by_limit(costs, density, found)
