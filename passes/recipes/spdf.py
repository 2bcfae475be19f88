"""SPDF."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.pipeline import Pipeline


def spdf(density: float = 0.25, seed: int | None = None, targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """The fixed random mask that sparse pre-training starts from, a quarter of every layer; dense fine-tuning drops it again.

    MediSwift (Thangarasa et al., arXiv:2403.00952) does the same with texts of one field.

    Paper      SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models, Thangarasa et al., arXiv:2303.10464
    """
    return Pipeline((MaskWeights("random", "unstructured", "uniform", density, targets, ignore, seed=seed),))
