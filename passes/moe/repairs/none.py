"""None: what is skipped is 0."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.moe._evidence import Evidence
from sparsify_compiler.passes.moe._split import Split


def none(evidence: Evidence, split: Split, chosen: Tensor) -> Split:
    """The split as it is."""
    return split
