"""G2GNet."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.pipeline import Pipeline


def g2gnet(density: float | None = None, group: int = 16, steps: int = 1000, every: int = 100, fraction: float = 0.3, grow: str = "correlation",
           targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training from scratch: groups read a few groups, at random; then the smallest weights go, and those of correlated activations come.

    What a layer gives is taken before its activation function. Layers that do not divide into groups stay dense.

    Paper      Neuro-inspired Ensemble-to-Ensemble Communication Primitives for Sparse and Efficient ANNs, Konstantaropoulos et al., arXiv:2508.14140
    """
    start = MaskWeights("random", f"{group}x{group}", "uniform", density, targets, ignore, "skip")
    moved = MoveMasks(grow=grow, fraction=fraction, decay=f"cosine(end={steps})", every=every, until=steps, structure="unstructured")
    return Pipeline((start, moved))
