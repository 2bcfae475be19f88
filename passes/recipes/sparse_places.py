"""Semi-structured activation sparsity."""

from __future__ import annotations

from sparsify_compiler.passes.prune.gate_positions import GatePositions
from sparsify_compiler.passes.reparam.fold_batchnorm import FoldBatchnorm
from sparsify_compiler.passes.train.learn_masks import LearnMasks
from sparsify_compiler.pipeline import Pipeline


def sparse_places(density: float | None = None, steps: int = 1000, targets: tuple[str, ...] = ("conv",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training a CNN on: places of each convolution's image are shut in all filters at once; which, is learnt until `steps`, and stays then.

    The paper draws the places at random again and again, and freezes the best draw; here scores are trained. Weights train too. No kernel leaves
    the places out yet.

    Paper      Accelerating Deep Neural Networks via Semi-Structured Activation Sparsity, Grimaldi et al., arXiv:2309.06626
    """
    gates = GatePositions(density, targets=targets, ignore=ignore)
    return Pipeline((FoldBatchnorm(), gates, LearnMasks("sigmoid", steps, freeze=False, of="gates")))
