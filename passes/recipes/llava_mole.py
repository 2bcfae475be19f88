"""LLaVA-MoLE."""

from __future__ import annotations

from sparsify_compiler.passes.train.add_adapters import AddAdapters
from sparsify_compiler.pipeline import Pipeline


def llava_mole(experts: int = 3, rank: int = 32, scale: float = 2.0, targets: tuple[str, ...] = ("linear",),
               ignore: tuple[str, ...] = ()) -> Pipeline:
    """For fine-tuning on mixed data: beside each layer several low-rank changes, of which a router takes one for each token.

    In the paper beside those of the FFNs alone: name them in targets. Its loss for the balance of the experts is left out.

    Paper      LLaVA-MoLE: Sparse Mixture of LoRA Experts for Mitigating Data Conflicts in Instruction Finetuning MLLMs, Chen et al., arXiv:2401.16160
    """
    return Pipeline((AddAdapters(f"routed_low_rank(experts={experts}, rank={rank}, scale={float(scale)})", targets=targets, ignore=ignore),))
