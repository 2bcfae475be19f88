"""Greedy: within each block, skip a little more where that adds the least error for what it saves (TEAL, arXiv:2408.14690, algorithm 1)."""

from __future__ import annotations

from sparsify_compiler.passes.activation.budgets._base import Costs, Evidence

STATISTICS: tuple[str, ...] = ()


def greedy(costs: Costs, density: float, evidence: Evidence) -> dict[str, float]:
    """Site -> density; every block reads the same share of its weights.

    Each step skips as many more weights of one layer as a step of its block's smallest layer does: of the layer where the relative error of the
    layer's own output is then the smallest. The paper measures the error of the block's output instead, by running the block for every trial, as
    `block_greedy` does. What a layer's own error does to the block it does not say: on SmolLM2 it skips too much of down's inputs, whose errors reach
    the residual stream as they are, and equal densities (`uniform`) lose less.
    """
    blocks: dict[str, list[str]] = {}
    for site in costs:
        blocks.setdefault(evidence.block(site), []).append(site)
    found: dict[str, float] = {}
    for sites in blocks.values():
        found |= _block(sites, costs, density, evidence)
    return found


def _block(sites: list[str], costs: Costs, density: float, evidence: Evidence) -> dict[str, float]:
    errors = {site: evidence.errors(site) for site in sites}
    steps = min(len(curve) for curve in errors.values()) - 1
    total, unit = sum(costs[site] for site in sites), min(costs[site] for site in sites) / steps
    skipped = dict.fromkeys(sites, 0.0)
    left = (1 - density) * total
    while left > 1e-9 * total:
        open_ = [site for site in sites if skipped[site] < 1]
        moved = {site: min(skipped[site] + min(unit, left) / costs[site], 1.0) for site in open_}
        best = min(open_, key=lambda site: _at(errors[site], moved[site]))
        left -= (moved[best] - skipped[best]) * costs[best]
        skipped[best] = moved[best]
    return {site: 1 - share for site, share in skipped.items()}


def _at(curve: object, share: float) -> float:
    """The error where a share is skipped, between the points that were measured."""
    values: list[float] = curve.tolist()  # type: ignore[attr-defined]
    place = share * (len(values) - 1)
    low = min(int(place), len(values) - 2)
    return values[low] + (values[low + 1] - values[low]) * (place - low)
