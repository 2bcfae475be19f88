"""Aligned pruning: the best one-shot masks and values that this package has."""

from __future__ import annotations

from typing import Literal

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.pipeline import Pipeline


def aligned(structure: Structure | str = "unstructured", density: float | None = None, budget: str | None = None,
            targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = (),
            inputs: Literal["dense", "block", "pruned"] = "pruned") -> Pipeline:
    """Layer by layer, on what the cut layers before give it: towards the dense model's output by OBS and least squares; needs calibration.

    Unless a budget is named, layers get what the budget `curvature` gives them, or an equal share where the structure fixes the density.

    Paper      none: our own combination of SparseGPT (arXiv:2301.00774) with asymmetric calibration (arXiv:2504.02692), exact least squares, and a
               global threshold of Kronecker-factored curvature (arXiv:2312.17244)
    """
    shape = Structure.parse(structure) if isinstance(structure, str) else structure
    shared = budget or ("curvature" if shape.density is None else "uniform")
    return Pipeline((MaskWeights("repair", shape, shared, density, targets, ignore, repair="aligned", inputs=inputs),))
