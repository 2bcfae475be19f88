"""Block greedy: within each block, skip a little more where the block's own output then changes least (TEAL, arXiv:2408.14690, algorithm 1)."""

from __future__ import annotations

from sparsify_compiler.passes.activation.budgets._base import Costs, Evidence

STATISTICS: tuple[str, ...] = ()
STEPS = 10  # that lead from all to none of the block's largest layer


def block_greedy(costs: Costs, density: float, evidence: Evidence) -> dict[str, float]:
    """Site -> density; every block reads the same share of its weights.

    Each step skips as many more weights of one layer as a tenth of the block's largest layer has. For every step every layer of the block is tried,
    by running the block: a budget for models that are captured whole, and some ten seconds a block. `greedy` looks at each layer's output alone.
    """
    blocks: dict[str, list[str]] = {}
    for site in costs:
        blocks.setdefault(evidence.block(site), []).append(site)
    found: dict[str, float] = {}
    for sites in blocks.values():
        found |= _block(sites, costs, density, evidence) if len(sites) > 1 else dict.fromkeys(sites, density)
    return found


def _block(sites: list[str], costs: Costs, density: float, evidence: Evidence) -> dict[str, float]:
    total, unit = sum(costs[site] for site in sites), max(costs[site] for site in sites) / STEPS
    kept = dict.fromkeys(sites, 1.0)
    left = (1 - density) * total
    while left > 1e-9 * total:
        step = min(unit, left)
        tried = {site: max(kept[site] - step / costs[site], 0.0) for site in sites if kept[site] > 0}
        whole = {site: to for site, to in tried.items() if kept[site] - to >= step / costs[site] - 1e-9} or tried  # that have as much left
        best = min(whole, key=lambda site: evidence.block_error({**kept, site: whole[site]}))
        left -= (kept[best] - whole[best]) * costs[best]
        kept[best] = whole[best]
    return kept
