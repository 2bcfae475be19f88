"""PreCropping."""

from __future__ import annotations

from sparsify_compiler.passes.prune.remove_channels import RemoveChannels
from sparsify_compiler.pipeline import Pipeline


def precropping(density: float | None = None, budget: str = "erk", targets: tuple[str, ...] = ("neurons", "filters"), ignore: tuple[str, ...] = (),
                multiple: int = 1) -> Pipeline:
    """For training from scratch: fewer filters and neurons, as many as a budget leaves each layer; before training it does not matter which.

    Paper      Structured Pruning is All You Need for Pruning CNNs at Initialization, Cai et al., arXiv:2203.02549
    """
    return Pipeline((RemoveChannels("random", budget, density, targets, ignore, "writers", multiple),))
