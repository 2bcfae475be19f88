"""Progressive gradient flow."""

from __future__ import annotations

from typing import Literal

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures.nm import NM
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.pipeline import Pipeline


def progressive_gradient_flow(n: int = 1, m: int = 16, decays: Literal["mask", "structure"] = "mask", steps: int = 1000, dense: int = 0,
                              rate: float = 0.01, padded: bool = False, targets: tuple[str, ...] = ("linear",),
                              ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training: all weights learn, and those that are not kept count for less and less, or n of m goes from m - 1 by halves to n.

    From step `dense` on a weight that is not kept counts exp(-rate) times as much with every step; at `steps` the last of it is gone.

    Paper      Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers, Bambhaniya et al., arXiv:2402.04744
    """
    start = MaskWeights("magnitude", NM(n, m, padded=padded), "uniform", n / m, targets=targets, ignore=ignore)
    fades = f"exponential(start={dense}, end={max(steps, dense + 1)}, rate={float(rate)})"
    if decays == "mask":
        return Pipeline((start, MoveMasks(straight_through=True, rest=fades, every=1, until=1_000_000_000)))
    kept = [*(k for k in (m - 1, *(m >> i for i in range(1, m.bit_length()))) if k > n), n]
    begins = tuple(dense + i * max(steps - dense, len(kept)) // len(kept) for i in range(len(kept)))
    stages = f"stages(starts={begins}, levels={tuple((m - k) / (m - n) for k in kept)})"
    return Pipeline((start, MoveMasks(stages, straight_through=True, every=1, until=1_000_000_000)))
