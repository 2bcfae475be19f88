"""DaSS."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures.nm import NM
from sparsify_compiler.passes.prune.structures.unstructured import Unstructured
from sparsify_compiler.pipeline import Pipeline


def dass(n: int = 2, m: int = 4, density: float | None = None) -> Pipeline:
    """Cut up and gate projections N:M by |W| times norm of the hidden channel that they make, compared between outputs; down as Wanda does.

    With a density the masks are unstructured, compared within columns and within rows. Attention stays dense; needs calibration.

    Paper      Dependency-Aware Semi-Structured Sparsity of GLU Variants in Large Language Models, Guo et al., arXiv:2405.01943
    """
    made = NM(n, m, along="outputs") if density is None else Unstructured("column")
    read = NM(n, m) if density is None else Unstructured("row")
    score = "weight_times_hidden_norm"
    return Pipeline((MaskWeights(score, made, density=density, targets=("ffn:up", "ffn:gate")),
                     MaskWeights(score, read, density=density, targets=("ffn:down",))))
