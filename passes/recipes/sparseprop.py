"""SparseProp."""

from __future__ import annotations

from sparsify_compiler.passes.lower.pack import Pack
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.pipeline import Pipeline


def sparseprop(density: float = 0.1, budget: str = "uniform", targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """The largest weights of a trained model, packed: forward and backward passes of a training then touch those alone, for their own task.

    For attach(). The authors have kernels for convolutions too; of ours only linear layers train packed, so that convolutions are no target.

    Paper      SparseProp: Efficient Sparse Backpropagation for Faster Training of Neural Networks, Nikdan et al., arXiv:2302.04852
    """
    return Pipeline((MaskWeights("magnitude", "unstructured", budget, density, targets, ignore), Pack()))
