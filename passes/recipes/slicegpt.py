"""SliceGPT."""

from __future__ import annotations

from sparsify_compiler.passes.prune.remove_channels import RemoveChannels
from sparsify_compiler.passes.reparam.fold_norm_affine import FoldNormAffine
from sparsify_compiler.passes.reparam.layernorm_to_rmsnorm import LayernormToRmsnorm
from sparsify_compiler.passes.reparam.rotate_stream import RotateStream
from sparsify_compiler.pipeline import Pipeline


def slicegpt(density: float | None = None, share: int = 1, untie: bool = False, multiple: int = 8) -> Pipeline:
    """Turn the residual stream to its principal components, and cut the last ones; needs calibration and a model that is captured whole.

    `share` and `untie` as in rotate_stream. In the paper every block has a basis of its own (1), and embedding and head are two tables, both cut
    (True); a table that is tied stays whole otherwise, and is held once.

    Paper      SliceGPT: Compress Large Language Models by Deleting Rows and Columns, Ashkboos et al., arXiv:2401.15024
    """
    return Pipeline((LayernormToRmsnorm(untie), FoldNormAffine(untie), RotateStream(share, density, untie),
                     RemoveChannels("leading", "uniform", density, ("stream", "embedding") if untie else ("stream",), multiple=multiple)))
