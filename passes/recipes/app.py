"""APP."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.pipeline import Pipeline


def app(density: float = 0.366, first: float = 0.8, batches: int = 8, steps: int = 1000, score: str = "gradient_times_weight",
        targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training on data that arrives in `batches` large batches, of `steps` steps each: each keeps a smaller share, by the same factor.

    From `first` to `density`. The first cut is made before any gradient, by magnitude. Weights are compared layer by layer, in the paper over all.

    Paper      APP: Anytime Progressive Pruning, Misra et al., arXiv:2204.01640
    """
    start = MaskWeights("magnitude", "unstructured", "uniform", density, targets, ignore)
    falls = f"geometric(density={float(density)}, first={float(first)}, stages={batches}, every={steps})"
    return Pipeline((start, MoveMasks(falls, drop=score, every=steps, until=steps * (batches - 1))))
