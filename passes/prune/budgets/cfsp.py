"""CFSP's coarse budget: blocks that turn the residual stream further keep more (arXiv:2409.13199, section 3.2)."""

from __future__ import annotations

import math

from sparsify_compiler.passes.prune.budgets._base import Evidence, Shapes, scaled, sizes_of

STATISTICS: tuple[str, ...] = ("block_angle",)


def cfsp(shapes: Shapes, density: float, evidence: Evidence, *, steepness: float = 13.1072) -> dict[str, float]:
    """Site -> density, the same within a block, in proportion to sigmoid(steepness * (angle - mean angle over the blocks)), at most 1.

    The angle, in units of pi, is between the residual stream before and after the block, averaged over tokens. Layers in no block count as a
    block of mean angle. The authors sum angles over 128 * 1024 tokens and divide by 10,000, which makes their steepness of 1 be 13.1072 here.
    """
    sizes = sizes_of(shapes)
    block_of = {site: evidence.block(site) for site in shapes}
    inside = {block: site for site, block in block_of.items() if block != site}
    angles = {block: float(evidence.statistic(site, "block_angle")) for block, site in inside.items()}
    mean = math.fsum(angles.values()) / max(len(angles), 1)
    return scaled({site: _sigmoid(steepness * (angles.get(block, mean) - mean)) for site, block in block_of.items()}, sizes, density)


def _sigmoid(x: float) -> float:
    """In (0, 1) for any x: clamped where exp would overflow."""
    return 1 / (1 + math.exp(-min(max(x, -700.0), 700.0)))
