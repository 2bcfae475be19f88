"""Rotated inputs: select in a basis in which activations are sparser."""

from __future__ import annotations

from sparsify_compiler.passes.activation.select_inputs import SelectInputs
from sparsify_compiler.passes.reparam.fold_norm_affine import FoldNormAffine
from sparsify_compiler.passes.reparam.layernorm_to_rmsnorm import LayernormToRmsnorm
from sparsify_compiler.passes.reparam.rotate_stream import RotateStream
from sparsify_compiler.pipeline import Pipeline


def rotated_inputs(density: float | None = None, share: int = 10, budget: str = "sensitivity", targets: tuple[str, ...] = ("linear",),
                   ignore: tuple[str, ...] = ()) -> Pipeline:
    """Give the residual stream its principal components as basis, exactly, a new one every `share` norms, and select as TEAL does; needs calibration.

    Where the model was captured in parts the stream cannot be rotated, and only the selection acts.

    Paper      La RoSA: Enhancing LLM Efficiency via Layerwise Rotated Sparse Activation, arXiv:2507.01299, with a threshold in place of its top-k
    """
    basis = LayernormToRmsnorm() | FoldNormAffine() | RotateStream(share)
    return basis | SelectInputs("magnitude", "threshold", budget, density, targets=targets, ignore=ignore)
