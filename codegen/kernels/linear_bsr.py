"""linear_bsr on a CPU: blocks of r outputs × c inputs; the meaning is sparsify_compiler/ops/linear_bsr.py.

A block of c inputs is c columns. Block rows are cut into groups of at most 16 outputs, one vector of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsify_compiler.codegen.kernels.layout import Groups


def groups(tensors: Mapping[str, Tensor], attributes: Mapping[str, int]) -> Groups:
    """Block rows as groups of r outputs with the same columns."""
    c, r = attributes["c"], attributes["r"]
    columns = tensors["block_columns"].long()[:, None] * c + torch.arange(c)
    return Groups(tensors["values"].reshape(-1, r), columns.reshape(-1), tensors["block_row_pointers"].long() * c)


# Registers of 16 rows of x that a schedule holds at once, best first. r × vectors sums must leave registers for inputs and weights.
SCHEDULES = {"cpu": {16: (1,), 8: (2, 1), 4: (4, 2), 2: (2, 4), 1: (2, 4)}}
