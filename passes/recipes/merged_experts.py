"""M-SMoE and HC-SMoE."""

from __future__ import annotations

from sparsify_compiler.passes.moe.drop_experts import DropExperts
from sparsify_compiler.pipeline import Pipeline


def merged_experts(density: float | None = None) -> Pipeline:
    """Merge experts whose outputs are alike, each weighted with how often it is chosen.

    Paper      Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy, Li et al., arXiv:2310.01334; groups as in
               Retraining-Free Merging of Sparse MoE via Hierarchical Clustering, Chen et al., arXiv:2410.08589
    """
    return Pipeline((DropExperts("routed", "merged", density=density),))
