"""An FFN computed densely: the forms beside which its sparse ones are measured, by torch and by kernels, and the nodes that it becomes again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, fx

from sparsify_compiler.normal_form_edit import aten, insert, take_place
from sparsify_compiler.operands import operands
from sparsify_compiler.ops import select_ffn
from sparsify_compiler.passes.lower._layer import EAGER, Form, bound, row_of, usable
from sparsify_compiler.passes.lower._linear import Linear, eager
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region
from sparsify_compiler.splice import insert_formula


def ffn_layer(region: Region, node: fx.Node, x: Tensor, down: Tensor, program: Program, ctx: Context) -> Linear:
    """The FFN of a packed node as a layer with its dense forms, for rows x [rows, K]; down [N, H], as a linear has it."""
    tensors, attributes, bias = operands(region, node)
    layer = Linear(region, node, row_of(region, node, "linear", down, program), down, bias, packed=True, rows=x.shape[0])
    biases = {"gate": tensors.get("gate_bias"), "up": tensors.get("up_bias"), "down": bias}
    linears = {name: (down if name == "down" else tensors[name], biases[name]) for name in biases if name in tensors}
    add_dense(layer, linears, str(attributes["activation"]), x, ctx)
    return layer


def insert_ffn(region: Region, node: fx.Node, down: fx.Node, chosen: Callable[[fx.Node], fx.Node] = lambda gates: gates) -> list[fx.Node]:
    """The FFN of a packed node out of linears, in its place; `chosen` of its activated gates go on. Returns the linears."""
    given: Any = node.kwargs
    weights = {name: given[name] for name in ("gate", "up") if name in given} | {"down": down}
    biases = {"gate": given.get("gate_bias"), "up": given.get("up_bias"), "down": given.get("bias")}
    stored = {name: (weight, biases[name]) for name, weight in weights.items()}
    linears = linears_before(region, node, given["x"], stored, given["activation"], chosen)
    take_place(node, linears[-1], "lower")
    return linears


def linears_before(region: Region, before: fx.Node, x: Any, stored: Mapping[str, tuple[Any, Any]], activation: str,
                   chosen: Callable[[fx.Node], fx.Node] = lambda gates: gates) -> list[fx.Node]:
    """An FFN of x in front of a node, out of the nodes of weights and biases (None for none) of "gate", "up" where there is one, and "down".

    `chosen` of its activated gates go on. Returns the linears, down last.
    """
    def linear(name: str, source: Any) -> fx.Node:
        weight, bias = stored[name]
        made = insert(before, aten.linear.default, input=source, weight=weight, **({} if bias is None else {"bias": bias}))
        made.meta["by"] = "lower"
        return made

    linears = [linear(name, x) for name in ("gate", "up") if name in stored]
    hidden = chosen(insert_formula(region, before, lambda x: select_ffn.ACTIVATIONS[activation](x), {"x": linears[0]}, "lower"))
    if len(linears) == 2:
        raised = linears[1]
        if activation in select_ffn.UP:
            raised = insert_formula(region, before, partial(select_ffn.raised, activation), {"up": raised}, "lower")
        hidden = insert(before, aten.mul.Tensor, self=hidden, other=raised)
        hidden.meta["by"] = "lower"
    return [*linears, linear("down", hidden)]


def size_of(region: Region, node: fx.Node) -> int:
    """Bytes of the weights of a packed FFN, or of a mixture of them."""
    values = [node.kwargs[name].meta["val"] for name in ("gate", "up", "down") if isinstance(node.kwargs.get(name), fx.Node)]  # type: ignore[union-attr]
    return sum(int(value.numel() * value.element_size()) for value in values)


def add_dense(layer: Linear, linears: Mapping[str, tuple[Tensor, Tensor | None]], activation: str, x: Tensor, ctx: Context) -> None:
    """Both forms for rows x [rows, K]. linears: weight [N, K] and bias of "gate", "up" and "down"; one of the first two may be missing."""
    assert ctx.kernels is not None
    assert ctx.target is not None
    layer.add(EAGER, partial(whole, {name: partial(eager, *pair) for name, pair in linears.items()}, activation), x, None, Form())
    found = {name: usable(ctx.kernels.candidates("linear", {"weight": weight}, {"any_rows": True}, x.dtype, (layer.rows,), ctx.target), ctx)
             for name, (weight, _) in linears.items()}
    if all(found.values()):
        packed = {name: bound(candidates[0], linears[name][1], ctx) for name, candidates in found.items()}
        layer.add(next(iter(found.values()))[0].name, partial(whole, packed, activation), x, None, Form())


def hidden(linears: Mapping[str, Any], activation: str, x: Tensor) -> Tensor:
    """What down reads. linears: functions of x by name."""
    first, *second = (linears[name](x) for name in ("gate", "up") if name in linears)
    return select_ffn.hidden(activation, first, *second)


def whole(linears: Mapping[str, Any], activation: str, x: Tensor) -> Tensor:
    """What the FFN gives."""
    y: Tensor = linears["down"](hidden(linears, activation, x))
    return y
