"""HyperSparse: small weights are pressed as by L1, those that will be kept hardly (HyperSparse Neural Networks, arXiv:2308.07163)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BEND = math.atanh(1 / math.sqrt(3))  # where tanh bends most


def hyper_sparse(weights: Sequence[Tensor], kept: int) -> Tensor:
    """The value of L1, sum |w|, with the gradient sign(w) s / cosh²(s |w|) sum |w| / sum tanh(s |w|); s bends tanh at the smallest weight to be kept.

    Weights are compared over all layers. The authors' form is less sum |w|, so that its value is always 0.
    """
    sizes = torch.cat([weight.abs() for weight in weights])
    total = sizes.detach().sum()
    if not sizes.numel():
        return total
    limit = sizes.detach().kthvalue(min(max(sizes.numel() - kept + 1, 1), sizes.numel())).values
    bent = torch.tanh(sizes * (BEND / limit.clamp_min(torch.finfo(limit.dtype).tiny))).sum()
    return total * bent / bent.detach().clamp_min(torch.finfo(bent.dtype).tiny)
