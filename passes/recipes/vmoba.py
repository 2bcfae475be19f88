"""VMoBA."""

from __future__ import annotations

from math import prod

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.patterns.windows import Windows
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.pipeline import Pipeline


def vmoba(shape: tuple[int, ...] = (8, 8, 8), sizes: tuple[tuple[int, ...], ...] = ((1, 8, 8), (8, 2, 4), (4, 4, 4)), mass: float = 0.25,
          targets: tuple[str, ...] = KIND, ignore: tuple[str, ...] = ()) -> Pipeline:
    """Blocks of a video of `shape` (frames, height, width), by time, by place and by both, layer by layer in turn; a head reads the likest pairs.

    sizes are as many tokens each. A block of queries chooses together; in the paper each query does. It trains as it stands, and may be used without.

    Paper      VMoBA: Mixture-of-Block Attention for Video Diffusion Models, Wu et al., arXiv:2506.23858
    """
    block, orders = prod(sizes[0]), tuple(f"cuboids(shape={shape!r}, size={size!r})" for size in sizes)
    return Pipeline((SelectBlocks((Windows(block),), "pooled", f"head_mass(mass={mass})", block, block, orders, targets=targets, ignore=ignore),))
