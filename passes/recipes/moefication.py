"""MoEfication."""

from __future__ import annotations

from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.pipeline import Pipeline


def moefication(experts: int = 16, top_k: int = 0, density: float | None = None, partition: str = "balanced_kmeans", router: str = "mlp") -> Pipeline:
    """Divide each FFN into experts of neurons that read alike; a small network, trained on calibration, predicts which of them matter.

    top_k  experts of each row; 0 leaves it to the density. partition="coactivation_graph" is the paper's other, router="mean_weights" its baseline

    Paper      MoEfication: Transformer Feed-forward Layers are Mixtures of Experts, Zhang et al., arXiv:2110.01786
    """
    return Pipeline((SplitExperts(experts, partition, router, f"top_k(k={top_k})" if top_k else "top_k", 0.0, repair="none", criterion="positive",
                                  density=density),))
