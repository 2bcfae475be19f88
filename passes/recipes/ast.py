"""AST."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train.add_adapters import AddAdapters
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.pipeline import Pipeline


def ast(structure: Structure | str = "2:4", penalty: float = 1e-4, steps: int = 1000, every: int = 10, size: int = 16,
        targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training towards the dense model, as recover() does: n:m masks follow the weights, and sums of `size` inputs stand for what is cut.

    All weights learn; those that are cut decay, more and more until a quarter of the steps.

    Paper      Pruning Large Language Models with Semi-Structural Adaptive Sparse Training, Huang et al., arXiv:2407.20584
    """
    start, grows = MaskWeights("magnitude", structure, "uniform", None, targets, ignore), f"ramp(end={max(1, steps // 4)})"
    moved = MoveMasks(straight_through=True, penalty=penalty, anneal=grows, every=every, until=steps)
    return Pipeline((start, moved, AddAdapters(f"group_sums(size={size})", freeze=False, targets=targets, ignore=ignore)))
