"""linear_csr: y = x W^T + bias with W in compressed sparse rows (formats/csr.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.formats._base import rows_from_pointers
from sparsify_compiler.formats.csr import Csr

from ._linear import CHUNK, compute_dtype, register


def reference(x: Tensor, values: Tensor, columns: Tensor, row_pointers: Tensor, bias: Tensor | None = None, *,
              out_features: int, in_features: int) -> Tensor:
    """y[..., n] = bias[n] + sum of values[i] * x[..., columns[i]] for i in row_pointers[n] to row_pointers[n + 1].

    x [..., K] any float dtype -> y [..., N] of the same dtype; sums in at least float32.
    """
    dtype = compute_dtype(x, values)
    owner = rows_from_pointers(row_pointers, values.shape[0])
    parts = []
    for part in torch.split(x.reshape(-1, in_features), max(1, CHUNK // max(1, values.shape[0]))):
        products = part.to(dtype).index_select(1, columns.int()) * values.to(dtype)
        parts.append(products.new_zeros(part.shape[0], out_features).index_add_(1, owner, products))
    y = torch.cat(parts)
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype).reshape(*x.shape[:-1], out_features)


op = register(Csr, reference)
