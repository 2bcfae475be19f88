"""Lottery Jackpots."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train.learn_masks import LearnMasks
from sparsify_compiler.pipeline import Pipeline


def lottery_jackpots(density: float | None = None, structure: Structure | str = "unstructured", budget: str = "uniform", steps: int = 1000,
                     every: int = 1, power: float = 4.0, targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training: weights stay, and a score for each learns, from the mask of the largest on, which of them are kept.

    With power=0 as many weights come in as their scores say, in every step.

    Paper      Lottery Jackpots Exist in Pre-trained Models, Zhang et al., arXiv:2104.08700
    """
    start = MaskWeights("magnitude", structure, budget, density, targets, ignore)
    return Pipeline((start, LearnMasks(f"top_k(power={float(power)})", until=steps, every=every)))
