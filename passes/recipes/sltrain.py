"""SLTrain."""

from __future__ import annotations

from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.train.add_adapters import AddAdapters
from sparsify_compiler.pipeline import Pipeline


def sltrain(density: float = 0.03, rank: int = 128, scale: float = 0.25, start: str = "zero", seed: int | None = None,
            targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training from the start: each weight is a low-rank one plus a sparse one, whose places are random and stay.

    A layer then has density * out * in + rank * (out + in) numbers; `| pack()`: so have gradients and optimizer. `scale` is alpha / r of the paper.
    The factors start as LoRA's, the sparse values as the model's own, so give it a model fresh from its constructor, or one that is trained, with
    start="principal": the factors take the best approximation of the weight then, and the sparse part keeps what is left at its places.
    merge_adapters(fill=True) makes one dense weight of both.

    Paper      SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining, Han et al., arXiv:2406.02214
    """
    beside = AddAdapters(f"low_rank(rank={rank}, scale={float(scale)}, start={start!r})", False, seed or 0, targets, ignore)
    return Pipeline((beside, MaskWeights("random", "unstructured", "uniform", density, targets, ignore, seed=seed)))
