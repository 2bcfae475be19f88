"""PAT."""

from __future__ import annotations

from sparsify_compiler.passes.prune.gate_channels import GateChannels
from sparsify_compiler.passes.train.add_adapters import AddAdapters
from sparsify_compiler.passes.train.learn_masks import LearnMasks
from sparsify_compiler.passes.train.penalise_weights import PenaliseWeights
from sparsify_compiler.pipeline import Pipeline


def pat(density: float | None = None, rank: int = 8, mixing: int = 16, steps: int = 1000, identity: float = 1.0, multiple: int = 1,
        targets: tuple[str, ...] = ("stream",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For fine-tuning into a smaller dense model: one mask over what all attentions and FFNs write is learnt, while low-rank adapters train.

    Each of those layers also mixes its outputs (`mixing`: the rank), so that what goes can be said by what stays. `steps`: of the last choice;
    `identity`: weight of the Identity Loss. Behind the training `merge_adapters() | drop_dead_channels() | fold_scale()` makes the smaller model,
    with the values of the trained one where norms are RMSNorms. A token embedding has a gate, and mixes nothing. A stream is followed in models
    that are captured whole (of Hugging Face with use_cache=False); targets=("neurons",) works in all.

    Paper      PAT: Pruning-Aware Tuning for Large Language Models, Liu et al., arXiv:2408.14721
    """
    gates = GateChannels(density=density, targets=targets, ignore=ignore, sides="writers", multiple=multiple, adapter=f"mixing(rank={mixing})")
    tuned = AddAdapters(f"low_rank(rank={rank})", freeze=False)
    straight = PenaliseWeights("orthonormal", identity, targets=("*.mixing_reads",), masked=False)
    return Pipeline((gates, LearnMasks("sigmoid", steps, freeze=False, of="gates"), tuned, straight))
