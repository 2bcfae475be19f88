"""SFT."""

from __future__ import annotations

from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.passes.train.train_subset import TrainSubset
from sparsify_compiler.pipeline import Pipeline


def sft(density: float = 0.05, steps: int = 1000, every: int = 100, fraction: float = 0.2,
        targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For fine-tuning: some places of each weight learn; every few steps those that have changed least go, and those of largest gradient come.

    `steps`, of the last exchange; the share that is exchanged falls in a line in the paper, along a cosine here.

    Paper      Scaling Sparse Fine-Tuning to Large Language Models, Ansell et al., arXiv:2401.16405, section 3.2 (SFT-AG)
    """
    moved = MoveMasks(grow="gradient", fraction=fraction, decay=f"cosine(end={steps})", every=every, until=steps, structure="unstructured")
    return Pipeline((TrainSubset("random", "unstructured", density, targets=targets, ignore=ignore), moved))
