"""Routing Transformer."""

from __future__ import annotations

from sparsify_compiler.passes.attention._sites import KIND
from sparsify_compiler.passes.attention.select_blocks import SelectBlocks
from sparsify_compiler.passes.train.move_centroids import MoveCentroids
from sparsify_compiler.pipeline import Pipeline


def routing_transformer(clusters: int = 16, blocks: int = 4, block: int = 64, decay: float = 0.999, targets: tuple[str, ...] = KIND,
                        ignore: tuple[str, ...] = ()) -> Pipeline:
    """Bring queries and keys of one cluster together; a block of queries attends to the blocks of keys that share most clusters with it.

    Centroids are found by k-means on the calibration batches, and follow what is nearest to them while the model trains. In the paper clusters are of
    one size, and half of the heads read what is near instead; here a cluster may be of any size. Blocks of queries choose together, later ones too.

    Paper      Efficient Content-Based Sparse Attention with Routing Transformers, Roy et al., arXiv:2003.05997
    """
    by, orders = f"(number={clusters})", (f"by_cluster(number={clusters})",)
    selector = f"top_k(share=0.0, blocks={blocks})"
    routed = SelectBlocks((), f"shared_clusters{by}", selector, block, block, orders, dense_below=0, targets=targets, ignore=ignore)
    return Pipeline((routed, MoveCentroids(decay, targets, ignore)))
