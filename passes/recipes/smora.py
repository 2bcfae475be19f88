"""SMoRA."""

from __future__ import annotations

from sparsify_compiler.passes.train.add_adapters import AddAdapters
from sparsify_compiler.pipeline import Pipeline


def smora(ranks: int = 64, chosen: int = 8, scale: float = 2.0, targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For fine-tuning on many tasks: a low-rank change beside each layer, of whose ranks a router takes a few for each token.

    Its loads are left to the router, without the paper's correction of them.

    Paper      Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning, Zhao et al., arXiv:2501.15103
    """
    change = f"routed_low_rank(experts={ranks}, rank=1, chosen={chosen}, scale={float(scale)})"
    return Pipeline((AddAdapters(change, targets=targets, ignore=ignore),))
