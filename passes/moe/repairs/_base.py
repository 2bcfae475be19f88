"""What repairs of experts share.

A repair is a function `name(evidence, split, chosen, *, options...) -> Split` in a file of its own: chosen int64 [R, k], the experts of each row of
calibration, -1 for none. It may change down, bias, shared["down"] and base. STATISTICS as in partitions.
"""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.moe._evidence import Evidence, take
from sparsify_compiler.passes.moe._split import Split, times


def computed(evidence: Evidence, split: Split, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(neurons float32 [R, E, S], how often the row chose their expert [R, E])."""
    return take(evidence.neurons, split.table, 1), times(chosen, split.experts)
