"""RIA."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.pipeline import Pipeline


def ria(structure: Structure | str = "unstructured", density: float | None = None, budget: str = "uniform",
        targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Cut the weights of smallest relative importance, |W| / its row + |W| / its column, times norm of its input^0.5; needs calibration.

    Paper      Plug-and-Play: An Efficient Post-training Pruning Method for LLMs, Zhang et al., ICLR 2024, doi:10.20944/preprints202310.1487
    """
    return Pipeline((MaskWeights("relative_importance", structure, budget, density, targets, ignore),))
