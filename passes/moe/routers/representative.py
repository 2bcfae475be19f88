"""Representative: the one neuron of an expert whose activity is nearest to the expert's mean speaks for it; no training (CMoE, arXiv:2502.04416)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.ops.select_ffn import hidden
from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes.moe.routers._base import Task

STATISTICS = ("rows",)


def representative(task: Task, *, share: float = 0.1) -> Formula:
    """The magnitude of that neuron, computed from its own rows of gate and up; activity is evidence.active(share)."""
    active = task.evidence.active(share).float()
    chosen = []
    for neurons in task.table:
        mine = neurons[neurons >= 0]
        columns = active[:, mine]
        distance = (columns - columns.mean(1, keepdim=True)).abs().sum(0)
        chosen.append(mine[distance.argmin()] if mine.numel() else torch.tensor(-1, dtype=torch.int64))
    own = task.evidence.ffn.part(torch.stack(chosen))
    tensors = {f"router_{name}": value for name, value in own.items() if name != "down"}
    return Formula(tensors, partial(_magnitude, activation=task.evidence.ffn.activation))


def _magnitude(x: Tensor, router_gate: Tensor, router_up: Tensor | None = None, router_gate_bias: Tensor | None = None,
               router_up_bias: Tensor | None = None, *, activation: str) -> Tensor:
    up = None if router_up is None else linear(x, router_up, router_up_bias)
    return hidden(activation, linear(x, router_gate, router_gate_bias), up).float().abs()
