"""Oracle: computes every expert and knows how much each one matters. Nothing is saved: it is the bound for all other routers."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.ops.select_ffn import hidden
from sparsify_compiler.passes.moe._criteria import CRITERIA
from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes.moe.routers._base import Task


def oracle(task: Task) -> Formula:
    """The task's criterion itself."""
    return Formula({}, partial(measured, activation=task.evidence.ffn.activation, criterion=task.criterion))


def measured(x: Tensor, gate: Tensor, down: Tensor, up: Tensor | None = None, gate_bias: Tensor | None = None, up_bias: Tensor | None = None, *,
             activation: str, criterion: str) -> Tensor:
    """How much each expert matters, by a name of _criteria.CRITERIA: x [..., K], gate and up [E, S, K], down [E, N, S] -> float32 [..., E]."""
    neurons = hidden(activation, _each(x, gate, gate_bias), None if up is None else _each(x, up, up_bias))
    return CRITERIA[criterion](neurons.float(), down.float())


def _each(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[..., K] and [E, S, K] -> [..., E, S]."""
    found: Tensor = linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return found.reshape(*found.shape[:-1], weight.shape[0], weight.shape[1])
