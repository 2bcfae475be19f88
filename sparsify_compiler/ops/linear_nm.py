"""linear_nm: y = x W^T + bias with n of every m inputs kept (formats/nm.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.formats.nm import Nm

from ._linear import register
from .linear_condensed import reference as condensed_reference


def reference(x: Tensor, values: Tensor, offsets: Tensor, bias: Tensor | None = None, *,
              out_features: int, in_features: int, n: int, m: int) -> Tensor:
    """y[..., j] = bias[j] + sum over i of values[j, i] * x[..., (i // n) * m + offsets[j, i]].

    x [..., K] any float dtype -> y [..., N] of the same dtype; sums in at least float32.
    """
    groups = torch.arange(offsets.shape[1], dtype=torch.int32, device=offsets.device) // n
    return condensed_reference(x, values, groups * m + offsets, bias, out_features=out_features, in_features=in_features)


op = register(Nm, reference)
