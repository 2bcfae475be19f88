"""Top-k Transformer."""

from __future__ import annotations

from sparsify_compiler.passes.activation.select_inputs import SelectInputs
from sparsify_compiler.pipeline import Pipeline


def lazy_neuron(density: float | None = None, targets: tuple[str, ...] = ("ffn:down",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Keep the same number of hidden neurons of every FFN in every row, those of highest activation; made for models that are trained with it.

    Paper      The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers, Li et al., arXiv:2210.06313
    """
    return Pipeline((SelectInputs("magnitude", "top_k", "uniform", density, targets=targets, ignore=ignore),))
