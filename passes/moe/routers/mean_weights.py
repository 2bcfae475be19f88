"""Mean weights: an expert is what its neurons read on average; no data (the similarity selection of MoEfication, arXiv:2110.01786, section 3.3)."""

from __future__ import annotations

import torch

from sparsify_compiler.passes.moe._evidence import Formula, take
from sparsify_compiler.passes.moe.routers._base import Task, scored


def mean_weights(task: Task) -> Formula:
    """The mean of the rows of gate of the expert's neurons, times x."""
    ffn, counts = task.evidence.ffn, (task.table >= 0).sum(1).clamp_min(1)
    weight = take(ffn.gate, task.table, 0).sum(1) / counts[:, None]
    offset = torch.zeros(task.experts, dtype=torch.float32) if ffn.gate_bias is None else take(ffn.gate_bias, task.table, 0).sum(1) / counts
    return Formula({"weight": weight, "offset": offset}, scored)
