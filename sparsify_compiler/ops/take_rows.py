"""take_rows: the rows of a value that a block runs on; put_rows brings what it gives back to its place."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler import session

from ._linear import LIBRARY


def reference(x: Tensor, open: Tensor) -> Tensor:
    """x [..., rows, K], open [..., rows, 1], 0 for a closed row -> the open rows [1, ..., n, K], in order; a NaN is open.

    In a graph that is traced all of x, for the number of rows would depend on the data: put_rows drops what closed rows give.
    """
    torch._check(open.dim() == x.dim() and open.shape[:-1] == x.shape[:-1] and open.shape[-1] == 1,
                 lambda: f"take_rows: x and open have shapes {tuple(x.shape)} and {tuple(open.shape)}, needs [..., rows, K] and [..., rows, 1]")  # type: ignore[no-untyped-call]
    if session.traced(x, open):
        return x.clone()
    taken = x.reshape(-1, x.shape[-1])[(open != 0).reshape(-1)]
    return taken.view(*(1,) * (x.dim() - 2), *taken.shape)


LIBRARY.define("take_rows(Tensor x, Tensor open) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("take_rows", reference, "CompositeImplicitAutograd")
op = torch.ops.sparsify.take_rows.default
