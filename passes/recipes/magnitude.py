"""Magnitude pruning."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.pipeline import Pipeline


def magnitude(structure: Structure | str = "unstructured", density: float | None = None, budget: str = "uniform",
              targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Cut the weights of smallest magnitude, layer by layer.

    Paper      Learning both Weights and Connections for Efficient Neural Networks, Han et al., arXiv:1506.02626
    """
    return Pipeline((MaskWeights("magnitude", structure, budget, density, targets, ignore),))
