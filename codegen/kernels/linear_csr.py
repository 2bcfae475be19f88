"""linear_csr on a CPU: any mask; the meaning is sparsify_compiler/ops/linear_csr.py. A row is a group of its own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sparsify_compiler.codegen.kernels.layout import Groups


def groups(tensors: Mapping[str, Tensor], attributes: Mapping[str, int]) -> Groups:
    """Rows as groups of one output."""
    return Groups(tensors["values"].reshape(-1, 1), tensors["columns"].long(), tensors["row_pointers"].long())


SCHEDULES = {"cpu": {1: (2, 4)}}
