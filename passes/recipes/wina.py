"""WINA."""

from __future__ import annotations

from sparsify_compiler.passes.activation.select_inputs import SelectInputs
from sparsify_compiler.passes.reparam.fold_norm_affine import FoldNormAffine
from sparsify_compiler.passes.reparam.layernorm_to_rmsnorm import LayernormToRmsnorm
from sparsify_compiler.passes.reparam.rotate_stream import RotateStream
from sparsify_compiler.pipeline import Pipeline


def wina(density: float | None = None, selector: str = "top_k", budget: str = "uniform", targets: tuple[str, ...] = ("linear",),
         ignore: tuple[str, ...] = (), share: int | None = None) -> Pipeline:
    """Select the inputs of highest magnitude times length of the weights that read them; needs calibration for the budget only.

    share   first turn the residual stream so that the weights of each key and gate projection have orthogonal columns, as in the paper: every
            `share` norms in a basis of their own. With the paper's 1, a matrix stands in every residual connection, which is read as well

    Paper      WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference, Chen et al., arXiv:2505.19427
    """
    select = Pipeline((SelectInputs("weight_norm", selector, budget, density, targets=targets, ignore=ignore),))
    turned = RotateStream(share or 0, basis="weights", readers=("attention:k", "ffn:gate"))
    return select if share is None else LayernormToRmsnorm() | FoldNormAffine() | turned | select
