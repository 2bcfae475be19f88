"""Q-Sparse."""

from __future__ import annotations

from sparsify_compiler.passes.activation.select_inputs import SelectInputs
from sparsify_compiler.pipeline import Pipeline


def q_sparse(density: float | None = None, targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Keep the same number of inputs in every row and every layer, those of highest magnitude; made for models that are trained with it.

    In training the gradient goes straight through. The paper's models have squared ReLU in their FFNs: relu2_wins() | q_sparse().

    Paper      Q-Sparse: All Large Language Models can be Fully Sparsely-Activated, Wang et al., arXiv:2407.10969
    """
    return Pipeline((SelectInputs("magnitude", "top_k", "uniform", density, targets=targets, ignore=ignore, straight_through=True),))
