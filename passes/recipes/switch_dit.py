"""Switch-DiT."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.penalise_routing import PenaliseRouting
from sparsify_compiler.pipeline import Pipeline


def switch_dit(given: str = "t_embedder", experts: int = 3, top_k: int = 2, shared: float = 0.25, balance: float = 0.01) -> Pipeline:
    """For training diffusion transformers: beside shared neurons copies of the others, chosen for a whole image by the embedding of its time.

    given: the module that embeds times. The paper's experts weigh what enters a block, and its loss draws routes towards a prior over times: here
    they are in the FFN, and are used alike

    Paper      Switch Diffusion Transformer: Synergizing Denoising Tasks with Sparse Mixture-of-Experts, Park et al., arXiv:2403.09176
    """
    split = SplitExperts(experts, "copies", "random", f"top_k(k={top_k})", shared, "weight_norm", "normalised", "none", given=given)
    return Pipeline((split, PenaliseRouting("load_balance", balance)))
