"""linear_bitmap on a CPU: any mask, stored as bits; the meaning is sparsify_compiler/ops/linear_bitmap.py. For the kernel its places are columns."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sparsify_compiler.codegen.kernels import linear_csr
from sparsify_compiler.codegen.kernels.layout import Groups
from sparsify_compiler.ops.linear_bitmap import entries


def groups(tensors: Mapping[str, Tensor], attributes: Mapping[str, int]) -> Groups:
    """Rows as groups of one output."""
    columns, row_pointers = entries(tensors["bits"], attributes["out_features"], attributes["in_features"])
    return linear_csr.groups({"values": tensors["values"], "columns": columns, "row_pointers": row_pointers}, attributes)


SCHEDULES = linear_csr.SCHEDULES
