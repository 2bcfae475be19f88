"""linear_nm on a CPU: n of every m inputs kept; the meaning is sparsify_compiler/ops/linear_nm.py. Offsets become columns: constant fan-in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsify_compiler.codegen.kernels import linear_condensed
from sparsify_compiler.codegen.kernels.layout import Groups


def groups(tensors: Mapping[str, Tensor], attributes: Mapping[str, int]) -> Groups:
    """Rows as groups of one output, all of the same length."""
    offsets = tensors["offsets"].long()
    start = torch.arange(offsets.shape[1]) // attributes["n"] * attributes["m"]
    return linear_condensed.groups({"values": tensors["values"], "columns": start + offsets}, attributes)


SCHEDULES = linear_condensed.SCHEDULES
