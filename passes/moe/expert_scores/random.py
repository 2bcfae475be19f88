"""Random: whichever; what a score has to be better than."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.passes.moe._observed import Observed


def random(evidence: Observed) -> Tensor:
    """Between 0 and 1, by the seed."""
    return torch.rand(evidence.experts, generator=evidence.generator(), dtype=torch.float32)
