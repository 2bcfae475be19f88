"""A small network behind the layer, around which its output goes (Houlsby et al., arXiv:1902.00751; masked at the start: SparseAdapter)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from sparsify_compiler.errors import ParseError
from sparsify_compiler.passes.train.adapters._base import Adapter, check_rank

CHANGES = True
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": relu, "gelu": gelu, "silu": silu}


def bottleneck(weight: Tensor, seed: int, mask: Tensor | None = None, *, rank: int = 16, scale: float = 1.0, activation: str = "relu",
               spread: float = 0.01) -> Adapter:
    """y + scale * linear(activation(linear(y, reads)), writes), y what the layer gives.

    spread  standard deviation of both at the start: 0 for the last alone would start with no change, and no gradient would tell its inputs apart
    """
    check_rank(rank)
    if activation not in ACTIVATIONS or spread <= 0:
        raise ParseError(f"activation is one of {', '.join(ACTIVATIONS)} and spread above 0: {activation!r}, {spread}", where="adapter bottleneck")
    generator, width = torch.Generator().manual_seed(seed), weight.shape[0]
    reads, writes = (torch.randn(shape, generator=generator, dtype=torch.float32) * spread for shape in ((rank, width), (width, rank)))
    formula = partial(_changed, scale=scale, activation=activation)
    return Adapter("behind", formula, {"reads": reads.to(weight), "writes": writes.to(weight)})


def _changed(y: Tensor, reads: Tensor, writes: Tensor, *, scale: float, activation: str) -> Tensor:
    change = linear(ACTIVATIONS[activation](linear(y, reads)), writes)
    return change if scale == 1 else change * scale
