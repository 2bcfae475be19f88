"""Change: by how much of its length a block moves the residual stream, on average over the rows of calibration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify_compiler.passes.moe._depth import Depth, seen
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program


def change(program: Program, blocks: Sequence[Depth], ctx: Context) -> Tensor:
    """The mean of ||f(x)|| / ||x||."""
    rows = seen(program, blocks, ctx)
    return torch.stack([rows[one.path][1].mean() for one in blocks])
