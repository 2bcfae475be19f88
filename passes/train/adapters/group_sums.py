"""Each output reads sums of neighbouring inputs beside the layer, in place of the weights that the mask cut (SLoRB of AST, arXiv:2407.20584)."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.errors import ParseError, StructureError
from sparsify_compiler.passes.train.adapters._base import Adapter

CHANGES = True


def group_sums(weight: Tensor, seed: int, mask: Tensor | None = None, *, size: int = 16, start: str = "mean") -> Adapter:
    """linear(x, weight * mask) + linear(sums, writes): sums [..., in / size] of x over runs of `size` inputs, writes [out, in / size].

    start  "mean": writes are the means over the runs of the weights that are cut, 0 for those that are kept; "zero". The sums do not train
    """
    outputs, inputs = weight.shape
    if size < 1 or start not in ("mean", "zero"):
        raise ParseError(f"size is 1 or more and start 'mean' or 'zero', got {size}, {start!r}", where="adapter group_sums")
    size = min(size, inputs)
    if inputs % size:
        raise StructureError(f"{inputs} inputs do not divide into runs of {size}", where="adapter group_sums", hint="another size, or ignore=")
    if start == "zero" or mask is None:
        writes = weight.new_zeros(outputs, inputs // size)
    else:
        writes = (weight * ~mask).view(outputs, -1, size).mean(2)
    return Adapter("beside", partial(_change, size=size), {"writes": writes})


def _change(x: Tensor, writes: Tensor, *, size: int) -> Tensor:
    return linear(x.reshape(*x.shape[:-1], writes.shape[1], size).sum(-1), writes)
