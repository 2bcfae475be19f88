"""linear_bitmap: y = x W^T + bias with W as a bit mask and its kept values (formats/bitmap.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.formats.bitmap import Bitmap

from ._linear import register
from .linear_csr import reference as csr_reference


def reference(x: Tensor, values: Tensor, bits: Tensor, bias: Tensor | None = None, *, out_features: int, in_features: int) -> Tensor:
    """y[..., n] = bias[n] + sum of the next values of row n times x[..., k], over the set bits k of bits[n].

    x [..., K] any float dtype -> y [..., N] of the same dtype; sums in at least float32.
    """
    columns, row_pointers = entries(bits, out_features, in_features)
    return csr_reference(x, values, columns, row_pointers, bias, out_features=out_features, in_features=in_features)


def entries(bits: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Columns [nnz] and row pointers [N + 1], int64, of a mask's bits [N, ceil(K / 8)] uint8."""
    mask = Bitmap(values=bits, bits=bits, out_features=out_features, in_features=in_features).mask()
    counts = mask.sum(1)
    return mask.nonzero()[:, 1], torch.cat([counts.new_zeros(1), counts.cumsum(0)])


op = register(Bitmap, reference)
