"""Mean: an expert that a row skips gives what it gave on average where it was skipped; all experts together are the dense FFN still."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from sparsify_compiler.passes.moe._evidence import Evidence
from sparsify_compiler.passes.moe._split import Split
from sparsify_compiler.passes.moe.repairs._base import computed

STATISTICS = ("rows",)


def mean(evidence: Evidence, split: Split, chosen: Tensor) -> Split:
    """The mean goes into the base, and out again with the expert's own bias."""
    neurons, count = computed(evidence, split, chosen)
    skipped = (count == 0).float()
    means = (skipped.T[:, None] @ neurons.transpose(0, 1))[:, 0] / skipped.sum(0).clamp_min(1)[:, None]
    given = (split.down.float() @ means[..., None])[..., 0]
    base = given.sum(0) if split.base is None else split.base + given.sum(0)
    return replace(split, bias=-given if split.bias is None else split.bias - given, base=base)
