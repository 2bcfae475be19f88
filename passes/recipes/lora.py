"""LoRA."""

from __future__ import annotations

from sparsify_compiler.passes.train.add_adapters import AddAdapters
from sparsify_compiler.pipeline import Pipeline


def lora(rank: int = 8, scale: float = 2.0, targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For fine-tuning: every weight is frozen, and a low-rank change beside each layer trains.

    `scale` is alpha / r of the paper.

    Paper      LoRA: Low-Rank Adaptation of Large Language Models, Hu et al., arXiv:2106.09685
    """
    return Pipeline((AddAdapters(f"low_rank(rank={rank}, scale={float(scale)})", targets=targets, ignore=ignore),))
