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
    ffn = task.evidence.ffn
    computed = partial(_gated if ffn.up is not None else _plain, activation=ffn.activation, criterion=task.criterion)
    return Formula({}, computed)


def _plain(x: Tensor, gate: Tensor, down: Tensor, gate_bias: Tensor | None = None, *, activation: str, criterion: str) -> Tensor:
    return _measured(hidden(activation, _each(x, gate, gate_bias)), down, criterion)


def _gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None, *, activation: str,
           criterion: str) -> Tensor:
    return _measured(hidden(activation, _each(x, gate, gate_bias), _each(x, up, up_bias)), down, criterion)


def _each(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[..., K] and [E, S, K] -> [..., E, S]."""
    found: Tensor = linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return found.reshape(*found.shape[:-1], weight.shape[0], weight.shape[1])


def _measured(neurons: Tensor, down: Tensor, criterion: str) -> Tensor:
    return CRITERIA[criterion](neurons.float(), down.float())
