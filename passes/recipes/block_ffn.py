"""BlockFFN."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.penalise_routing import PenaliseRouting
from sparsify_compiler.pipeline import Pipeline


def block_ffn(experts: int = 64, density: float | None = None, sparsity: float = 0.01, chunk: int = 8) -> Pipeline:
    """For training: experts whose score is positive, weighted with it over the root mean square of all, and few of them for each chunk of tokens.

    Begins with the threshold of the density instead of 0, and trains towards chunks that agree

    Paper      BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with Chunk-Level Activation Sparsity, Song et al., arXiv:2507.08771
    """
    split = SplitExperts(experts, "contiguous", "random", "threshold", 0.0, "weight_norm", "score", "none", density=density)
    return Pipeline((split, PenaliseRouting(f"chunk_sparsity(chunk={chunk})", sparsity)))
