"""Plug-and-play."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.permute_channels import PermuteChannels
from sparsify_compiler.passes.prune.structures.nm import NM
from sparsify_compiler.pipeline import Pipeline


def plug_and_play(n: int = 2, m: int = 4, targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Order the hidden channels of FFNs so that N:M keeps more, then cut by relative importance (RIA); needs calibration.

    Paper      Plug-and-Play: An Efficient Post-training Pruning Method for LLMs, Zhang et al., ICLR 2024, doi:10.20944/preprints202310.1487
    """
    score, structure = "relative_importance", NM(n, m)
    return Pipeline((PermuteChannels(score, structure), MaskWeights(score, structure, targets=targets, ignore=ignore)))
