"""SPP."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train.add_adapters import AddAdapters
from sparsify_compiler.pipeline import Pipeline


def spp(density: float | None = None, structure: Structure | str = "row", rank: int = 1, scale: float = 1.0,
        targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For fine-tuning a sparse model: every kept weight changes in proportion to itself, by a product of few rows and columns that train.

    Paper      SPP: Sparsity-Preserved Parameter-Efficient Fine-Tuning for Large Language Models, Lu et al., arXiv:2405.16057
    """
    masks = MaskWeights("weight_times_input_norm", structure, "uniform", density, targets, ignore)
    return Pipeline((masks, AddAdapters(f"row_by_column(rank={rank}, scale={float(scale)})", targets=targets, ignore=ignore)))
