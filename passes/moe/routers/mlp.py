"""MLP: a small network says which experts matter most in a row, trained on calibration (MoEfication, arXiv:2110.01786, section 3.3)."""

from __future__ import annotations

from torch import Tensor

from sparsify_compiler.passes.activation import _predictor
from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes.moe.routers._base import Task

STATISTICS = ("rows",)


def mlp(task: Task, *, rank: int = 64, epochs: int = 6) -> Formula:
    """The predictor of passes/activation, for experts."""
    made = _predictor.fit(task.evidence.x, _predictor.margins(task.wanted, task.share)[None], rank, epochs, task.evidence.seed)[0]
    return Formula({name: getattr(made, name) for name in ("first", "first_bias", "second", "second_bias")}, _odds)


def _odds(x: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor) -> Tensor:
    return _predictor.scored(_predictor.hidden(x, first, first_bias), second, second_bias)
