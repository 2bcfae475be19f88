"""An FFN computed densely, beside which its sparse forms are measured: by torch, and by kernels where every linear has one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from sparsify_compiler.ops import select_ffn
from sparsify_compiler.passes.lower._layer import EAGER, Form
from sparsify_compiler.passes.lower._linear import Linear, eager
from sparsify_compiler.passes_api import Context


def add_dense(layer: Linear, linears: Mapping[str, tuple[Tensor, Tensor | None]], activation: str, x: Tensor, ctx: Context) -> None:
    """Both forms for rows x [rows, K]. linears: weight [N, K] and bias of "gate", "up" and "down"; one of the first two may be missing."""
    assert ctx.kernels is not None
    assert ctx.target is not None
    layer.add(EAGER, partial(whole, {name: partial(eager, *pair) for name, pair in linears.items()}, activation), x, None, Form())
    found = {name: ctx.kernels.candidates("linear", {"weight": weight}, {"any_rows": True}, x.dtype, (layer.rows,), ctx.target)
             for name, (weight, _) in linears.items()}
    if all(found.values()):
        packed = {name: candidates[0].bind(linears[name][1]) for name, candidates in found.items()}
        layer.add(next(iter(found.values()))[0].name, partial(whole, packed, activation), x, None, Form())


def hidden(linears: Mapping[str, Any], activation: str, x: Tensor) -> Tensor:
    """What down reads. linears: functions of x by name."""
    first, *second = (linears[name](x) for name in ("gate", "up") if name in linears)
    return select_ffn.hidden(activation, first, *second)


def whole(linears: Mapping[str, Any], activation: str, x: Tensor) -> Tensor:
    """What the FFN gives."""
    y: Tensor = linears["down"](hidden(linears, activation, x))
    return y
