"""Movement pruning."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.pipeline import Pipeline


def movement(structure: Structure | str = "unstructured", density: float | None = None, budget: str = "global_threshold",
             targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Keep the weights that fine-tuning moved away from zero: fine-tune inside of `with Movement(model)`, give its known() to compile().

    This is the paper's score, cut once at its end; the paper also cuts on the way, by a schedule.

    Paper      Movement Pruning: Adaptive Sparsity by Fine-Tuning, Sanh et al., arXiv:2005.07683
    """
    return Pipeline((MaskWeights("movement", structure, budget, density, targets, ignore),))
