"""Prune once for all."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.pipeline import Pipeline


def prune_ofa(density: float = 0.15, targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """The mask of one step of sparse pre-training: smallest magnitude of each layer. Its gradual schedule and distillation need training.

    Paper      Prune Once for All: Sparse Pre-Trained Language Models, Zafrir et al., arXiv:2111.05754
    """
    return Pipeline((MaskWeights("magnitude", "unstructured", "uniform", density, targets, ignore),))
