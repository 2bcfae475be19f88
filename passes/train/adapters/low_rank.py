"""A low-rank change beside the layer, which its mask does not touch (LoRA, arXiv:2106.09685; of masked layers DSEE, arXiv:2111.00160)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.errors import ParseError
from sparsify_compiler.passes.train.adapters._base import Adapter, check_rank, factors

STARTS = ("zero", "principal")


def low_rank(weight: Tensor, seed: int, mask: Tensor | None = None, *, rank: int = 8, scale: float = 1.0, share: float = 0.0,
             start: str = "zero") -> Adapter:
    """linear(x, weight) + scale * linear(linear(x, reads), writes).

    share  where above 0, the rank is that at which both factors together have this share of the weight's numbers
    start  "zero": the change starts at 0. "principal": the factors start as the best approximation of the weight, which becomes what is left
           (PiSSA, arXiv:2404.02948)
    """
    if start not in STARTS or not 0 <= share < 1:
        raise ParseError(f"start is one of {', '.join(STARTS)} and share between 0 and 1, got {start!r}, {share}", where="adapter low_rank")
    if start == "principal" and not scale > 0:
        raise ParseError(f"start='principal' divides by scale, which has to be above 0: got {scale}", where="adapter low_rank")
    if share:
        rank = max(1, int(share * weight.numel() / sum(weight.shape)))
    check_rank(rank)
    formula = partial(_change, scale=scale)
    if start == "zero":
        return Adapter("beside", formula, factors(weight, rank, seed))
    left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    tensors = {"reads": (root[:, None] * right[:rank]).to(weight.dtype), "writes": (left[:, :rank] * root).to(weight.dtype)}
    return Adapter("beside", formula, tensors, weight - scale * (tensors["writes"] @ tensors["reads"]))


def _change(x: Tensor, reads: Tensor, writes: Tensor, *, scale: float) -> Tensor:
    y = linear(linear(x, reads), writes)
    return y if scale == 1 else y * scale
