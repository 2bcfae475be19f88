"""put_rows: what a block gave on the rows that take_rows took, in their places; 0 in the rows that it did not run on."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler import session

from ._linear import LIBRARY


def reference(y: Tensor, open: Tensor) -> Tensor:
    """y [1, ..., n, N], open [..., rows, 1] with n rows that are not 0 -> [..., rows, N] of y's dtype. In a graph that is traced y has all rows."""
    if session.traced(y, open):
        return torch.where(open != 0, y, y.new_zeros(()))
    kept = (open != 0).reshape(-1)
    rows = y.reshape(-1, y.shape[-1])
    if rows.shape[0] == kept.shape[0]:
        return y.view(*open.shape[:-1], y.shape[-1])
    full = y.new_zeros(kept.shape[0], y.shape[-1])
    full = full.index_put((kept,), rows)
    return full.view(*open.shape[:-1], y.shape[-1])


LIBRARY.define("put_rows(Tensor y, Tensor open) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("put_rows", reference, "CompositeImplicitAutograd")
op = torch.ops.sparsify.put_rows.default
