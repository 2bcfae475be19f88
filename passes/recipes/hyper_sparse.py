"""HyperSparse."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.passes.train.penalise_weights import PenaliseWeights
from sparsify_compiler.pipeline import Pipeline


def hyper_sparse(density: float | None = None, structure: Structure | str = "unstructured", budget: str = "uniform", steps: int = 1000,
                 dense: int = 100, weight: float = 5e-6, growth: float = 0.01, loss: str = "hyper_sparse",
                 targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training: dense, under a loss of the weights that every step multiplies with exp(`growth`); at `steps` the smallest are cut (ART).

    The paper cuts when the cut network does as well as the whole one, over all layers at once; here at a step, each layer to its budget.

    Paper      HyperSparse Neural Networks: Shifting Exploration to Exploitation through Adaptive Regularization, Glandorf et al., arXiv:2308.07163
    """
    start = MaskWeights("magnitude", structure, budget, density, targets, ignore)
    grows = f"exponential(start={dense}, end={max(steps, dense + 1)}, rate={-float(growth)}, before=0.0)"
    return Pipeline((start, MoveMasks(f"after(start={steps})", every=steps, until=steps), PenaliseWeights(loss, weight, grows)))
