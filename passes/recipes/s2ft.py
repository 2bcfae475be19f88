"""S2FT."""

from __future__ import annotations

from sparsify_compiler.passes.train.train_subset import TrainSubset
from sparsify_compiler.pipeline import Pipeline


def s2ft(density: float = 0.05, targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = (), seed: int = 0) -> Pipeline:
    """For fine-tuning: some input channels of each weight, chosen at random, learn, and nothing else.

    In the paper those of the output projections and the FFN's down projections alone: targets=("attention:out", "ffn:down") where sites have such
    names. It moves them together into a dense part of the weight; packed, ours are columns of one.

    Paper      S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity, Yang et al., arXiv:2412.06289
    """
    return Pipeline((TrainSubset("random", "Columns()", density, seed, targets, ignore),))
