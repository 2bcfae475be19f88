"""MaskLLM."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train.learn_masks import LearnMasks
from sparsify_compiler.pipeline import Pipeline


def mask_llm(structure: Structure | str = "2:4", score: str = "weight_times_input_norm", steps: int = 2000, prior: float = 3.0, reward: float = 1e-5,
             targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training: weights stay, and each n:m group learns a distribution over its candidates, which starts near the mask of a `score`.

    `reward` is of the sum of squares of all weights, so that it depends on the model's size; the optimizer's weight decay should be 0.

    Paper      MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models, Fang et al., arXiv:2409.17481
    """
    start = MaskWeights(score, structure, "uniform", None, targets=targets, ignore=ignore)
    return Pipeline((start, LearnMasks(f"gumbel(prior={float(prior)})", until=steps, reward=reward)))
