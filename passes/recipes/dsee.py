"""DSEE."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train.add_adapters import AddAdapters
from sparsify_compiler.pipeline import Pipeline


def dsee(density: float | None = None, structure: Structure | str = "unstructured", rank: int = 16,
         targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For fine-tuning: the smallest weights go, the others are frozen, and a low-rank change beside each layer trains and stays beside it.

    The paper's further sparse change at 64 places a layer is left out: train_subset() has such, of a frozen model alone.

    Paper      DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models, Chen et al., arXiv:2111.00160
    """
    masks = MaskWeights("magnitude", structure, "global_threshold" if str(structure) == "unstructured" else "uniform", density, targets, ignore)
    return Pipeline((masks, AddAdapters(f"low_rank(rank={rank})", targets=targets, ignore=ignore)))
