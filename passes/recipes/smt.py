"""SMT."""

from __future__ import annotations

from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train.train_subset import TrainSubset
from sparsify_compiler.pipeline import Pipeline


def smt(density: float = 0.05, structure: Structure | str = "32x32", targets: tuple[str, ...] = ("linear",),
        ignore: tuple[str, ...] = ()) -> Pipeline:
    """For fine-tuning: the blocks of each weight with the largest gradients on the calibration batches learn, and nothing else.

    The paper's blocks have 256 rows and columns, and are ranked over all layers after a warm-up of 100 steps; here layer by layer, before the first.

    Paper      Sparse Matrix in Large Language Model Fine-tuning, He et al., arXiv:2405.15525
    """
    return Pipeline((TrainSubset("gradient", structure, density, targets=targets, ignore=ignore),))
