"""linear_condensed: y = x W^T + bias with W of constant fan-in (formats/condensed.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.formats.condensed import Condensed

from ._linear import CHUNK, compute_dtype, register


def reference(x: Tensor, values: Tensor, columns: Tensor, bias: Tensor | None = None, *, out_features: int, in_features: int) -> Tensor:
    """y[..., n] = bias[n] + sum over f of values[n, f] * x[..., columns[n, f]].

    x [..., K] any float dtype -> y [..., N] of the same dtype; sums in at least float32.
    """
    dtype = compute_dtype(x, values)
    flat = columns.int().reshape(-1)
    parts = []
    for part in torch.split(x.reshape(-1, in_features), max(1, CHUNK // max(1, flat.shape[0]))):
        gathered = part.to(dtype).index_select(1, flat).view(part.shape[0], *values.shape)
        parts.append((gathered * values.to(dtype)).sum(-1))
    y = torch.cat(parts)
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype).reshape(*x.shape[:-1], out_features)


op = register(Condensed, reference)
