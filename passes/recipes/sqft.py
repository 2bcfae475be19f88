"""SQFT."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train.add_adapters import AddAdapters
from sparsify_compiler.pipeline import Pipeline


def sqft(density: float | None = None, structure: Structure | str = "row", rank: int = 16, scale: float = 1.0,
         targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For fine-tuning a sparse model: Wanda's masks, then low-rank adapters inside of them, which merge without filling a zero (SparsePEFT).

    Weights stay in the model's own precision here: the paper's quantization is left out.

    Paper      SQFT: Low-cost Model Adaptation in Low-precision Sparse Foundation Models, Munoz et al., arXiv:2410.03750
    """
    masks = MaskWeights("weight_times_input_norm", structure, "uniform", density, targets, ignore)
    return Pipeline((masks, AddAdapters(f"masked_low_rank(rank={rank}, scale={float(scale)})", targets=targets, ignore=ignore)))
