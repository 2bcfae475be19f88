"""linear_bsr: y = x W^T + bias with W in blocks of r outputs × c inputs (formats/bsr.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.formats._base import rows_from_pointers
from sparsify_compiler.formats.bsr import Bsr

from ._linear import CHUNK, compute_dtype, register


def reference(x: Tensor, values: Tensor, block_columns: Tensor, block_row_pointers: Tensor, bias: Tensor | None = None, *,
              out_features: int, in_features: int, r: int, c: int) -> Tensor:
    """y[..., R * r + i] = bias[...] + sum over blocks b of block row R, and j < c, of values[b, j, i] * x[..., block_columns[b] * c + j].

    x [..., K] any float dtype -> y [..., N] of the same dtype; sums in at least float32.
    """
    dtype = compute_dtype(x, values)
    owner = rows_from_pointers(block_row_pointers, values.shape[0])
    block_rows = block_row_pointers.shape[0] - 1
    parts = []
    for part in torch.split(x.reshape(-1, in_features), max(1, CHUNK // max(1, values.numel()))):
        inputs = part.to(dtype).view(part.shape[0], in_features // c, c).index_select(1, block_columns.int())
        products = torch.einsum("mbc,bcr->mbr", inputs, values.to(dtype))
        summed = products.new_zeros(part.shape[0], block_rows, r).index_add_(1, owner, products)
        parts.append(summed.reshape(part.shape[0], block_rows * r)[:, :out_features])
    y = torch.cat(parts)
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype).reshape(*x.shape[:-1], out_features)


op = register(Bsr, reference)
