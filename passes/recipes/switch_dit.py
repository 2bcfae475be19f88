"""Switch-DiT."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.penalise_paths import PenalisePaths
from sparsify_compiler.pipeline import Pipeline


def switch_dit(given: str = "t_embedder", time: str = "t", experts: int = 3, top_k: int = 2, shared: float = 0.25, prior: float = 1.0) -> Pipeline:
    """For training diffusion transformers: beside shared neurons copies of the others, chosen for a whole image by the embedding of its time.

    given: the module that embeds times; time: the model's input that holds them, from 0 to 999. Routes are drawn to the paper's prior over times. The
    paper's experts weigh what enters a block: here they are in the FFN

    Paper      Switch Diffusion Transformer: Synergizing Denoising Tasks with Sparse Mixture-of-Experts, Park et al., arXiv:2403.09176
    """
    split = SplitExperts(experts, "copies", "random", f"top_k(k={top_k})", shared, "weight_norm", "normalised", "none", given=given)
    return Pipeline((split, PenalisePaths(time, weight=prior)))
