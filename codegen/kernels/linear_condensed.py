"""linear_condensed on a CPU: the same number of kept inputs in every row; the meaning is sparsify_compiler/ops/linear_condensed.py."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsify_compiler.codegen.kernels.layout import Groups


def groups(tensors: Mapping[str, Tensor], attributes: Mapping[str, int]) -> Groups:
    """Rows as groups of one output, all of the same length."""
    values = tensors["values"]
    rows, fan_in = values.shape
    return Groups(values.reshape(-1, 1), tensors["columns"].long().reshape(-1), torch.arange(rows + 1) * fan_in)


SCHEDULES = {"cpu": {1: (2, 4)}}
