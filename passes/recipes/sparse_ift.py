"""Sparse-IFT."""

from __future__ import annotations

from typing import Literal

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.train.add_adapters import AddAdapters
from sparsify_compiler.passes.train.expand_linears import ExpandLinears
from sparsify_compiler.passes.train.widen_channels import WidenChannels
from sparsify_compiler.passes_api import Pass
from sparsify_compiler.pipeline import Pipeline


def sparse_ift(density: float = 0.5, form: Literal["wide", "parallel", "factorized", "doped"] = "wide", budget: str = "uniform", seed: int = 0,
               targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training from the start: more weights than the dense model has, of which random ones are kept, as many as those were.

    Wide: more neurons. Parallel: 1 / density layers for each, rounded. Factorized: two for each. Doped: a low-rank layer beside each.
    `| move_masks(...)` moves the masks, as the paper does with RigL.

    Paper      Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training Efficiency, Thangarasa et al., arXiv:2303.11525
    """
    if form == "wide":
        more: Pass = WidenChannels(density, seed=seed)
    elif form == "doped":
        more = AddAdapters(f"low_rank(share={1 - density})", False, seed, targets, ignore)
    else:
        more = ExpandLinears(form, 1 / density, seed, targets, ignore)
    return Pipeline((more, MaskWeights("random", "unstructured", budget, density, targets, ignore, seed=seed)))
