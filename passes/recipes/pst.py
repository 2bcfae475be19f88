"""PST."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.train.add_adapters import AddAdapters
from sparsify_compiler.passes.train.learn_masks import LearnMasks
from sparsify_compiler.pipeline import Pipeline


def pst(density: float | None = None, rank: int = 8, scores: int = 8, steps: int = 1000, every: int = 1,
        targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For fine-tuning: weights get a low-rank change inside of masks that thin out until `steps`, by magnitudes and a score that learns.

    `rank`: of the change; `scores`: of the score, which has a number for each row and column besides. Nothing else trains.

    Paper      Parameter-Efficient Sparsity for Large Language Models Fine-Tuning, Li et al., arXiv:2205.11005
    """
    masks = MaskWeights("magnitude", "unstructured", "uniform", density, targets, ignore)
    learnt = LearnMasks(f"factored(rank={scores})", until=steps, every=every, sparsity=f"cubic(end={steps})", targets=targets, ignore=ignore)
    return Pipeline((masks, learnt, AddAdapters(f"masked_low_rank(rank={rank})", targets=targets, ignore=ignore)))
