"""DSnoT."""

from __future__ import annotations

from typing import Literal

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.pipeline import Pipeline


def dsnot(structure: Structure | str = "row", density: float | None = None, budget: str = "uniform",
          targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = (),
          inputs: Literal["dense", "block", "pruned"] = "block") -> Pipeline:
    """Wanda's masks, then in each row weights are exchanged until its mean error is small; needs calibration. No weight changes its value.

    The authors' program leaves FFNs to Wanda unless told otherwise: targets=("attention",), and wanda() behind it.

    Paper      Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs, Zhang et al., arXiv:2310.08915
    """
    return Pipeline((MaskWeights("weight_times_input_norm", structure, budget, density, targets, ignore, repair="dsnot", inputs=inputs),))
