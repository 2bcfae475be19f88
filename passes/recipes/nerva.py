"""Nerva."""

from __future__ import annotations

from sparsify_compiler.passes.lower.pack import Pack
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.pipeline import Pipeline


def nerva(density: float = 0.1, budget: str = "erk", seed: int | None = None,
          targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """A random mask that stays, packed from the first step on: a network that trains without ever having held its other weights. For attach().

    Paper      Nerva: a Truly Sparse Implementation of Neural Networks, Wesselink et al., arXiv:2407.17437
    """
    return Pipeline((MaskWeights("random", "unstructured", budget, density, targets, ignore, seed=seed), Pack()))
