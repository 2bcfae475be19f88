"""SparseGPT."""

from __future__ import annotations

from typing import Literal

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.pipeline import Pipeline


def sparsegpt(structure: Structure | str = "unstructured", density: float | None = None, budget: str = "uniform",
              targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = (),
              inputs: Literal["dense", "block", "pruned"] = "block") -> Pipeline:
    """Layer by layer, cut weights from left to right and make up for each with those to its right; needs calibration.

    `inputs` as in mask_weights: "block" is the authors' order, "pruned" also lets the layers of one block see each other cut, "dense" is for
    models that cannot be captured whole. Under attach() the zeros stay while the rest trains on, as in Sparse Llama (Agarwalla et al., Enabling
    High-Sparsity Foundational Llama Models with Efficient Pretraining and Deployment, arXiv:2405.03594); recover(losses=("squarehead",)) fine-tunes
    them so (Sparse Finetuning for Inference Acceleration of Large Language Models, Kurtic et al., arXiv:2310.06927).

    Paper      SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, Frantar and Alistarh, arXiv:2301.00774
    """
    return Pipeline((MaskWeights("repair", structure, budget, density, targets, ignore, repair="obs", inputs=inputs),))
