"""Gated FFNs of which every row selects its neurons: packed into one op, and lowered to a kernel that reads the selected weights only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx

from sparsify_compiler.normal_form_edit import aten, is_call, only_user, take_place
from sparsify_compiler.operands import operands
from sparsify_compiler.ops import select, select_ffn
from sparsify_compiler.passes.lower._dense_ffn import ffn_layer, insert_ffn, size_of
from sparsify_compiler.passes.lower._layer import Form, bound, row_of, rows_of, usable
from sparsify_compiler.passes.lower._linear import Linear, eager
from sparsify_compiler.passes.lower._selected import as_selected, by_input, choose, dense_weight, limit_of
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, Site, get_tensor
from sparsify_compiler.site_ffn import neurons_of

__all__ = ["choose", "find", "is_packed", "layer", "make_dense", "pack", "size_of"]  # it is chosen by what a layer is chosen by

ACTIVATIONS = {aten.silu.default: "silu", aten.relu.default: "relu", aten.sigmoid.default: "sigmoid", aten.gelu.default: "gelu"}
SQUARED, RAISED = {"relu": "relu2"}, {"relu": "drelu"}  # names of the whole, by the activation that is squared, and that up has too


@dataclass(frozen=True)
class Ffn:
    """The nodes of down(select(activation(gate(x)), ...) * up(x)), or without up."""

    gate: Any
    up: Any | None
    activation: str
    select: Any


def find(down: fx.Node) -> Ffn | None:
    """The gated FFN that ends at a linear and selects its neurons by its gate and a stored limit; None where it is another, or computed otherwise."""
    found = selecting(down)
    if found is None or found.up is None or found.select.kwargs["limit"].op != "get_attr":
        return None
    return found if all(found.select.kwargs.get(name) is None for name in ("center", "scores")) else None


def selecting(down: fx.Node) -> Ffn | None:
    """The FFN that ends at a linear and selects its neurons, by whatever; None where it is another."""
    source = down.kwargs.get("input") if _stored(down) else None
    if not isinstance(source, fx.Node) or only_user(source) is None:
        return None
    pairs: list[tuple[Any, Any]] = [(source, None)]
    if is_call(source, aten.mul.Tensor):
        one, other = source.kwargs["self"], source.kwargs["other"]
        pairs = [(one, other), (other, one)]
    for chosen, up in pairs:
        if not is_call(chosen, select.op) or only_user(chosen) is None:
            continue
        gate, name = activation_of(chosen.kwargs["x"])
        if is_call(up, aten.relu.default) and name in RAISED and only_user(up) is not None:
            up, name = up.kwargs["self"], RAISED[name]
        parts = [gate] if up is None else [gate, up]
        if all(_stored(part) and only_user(part) is not None and part.kwargs["input"] is gate.kwargs["input"] for part in parts):
            return Ffn(gate, up, name, chosen)
    return None


def activation_of(node: Any) -> tuple[Any, str]:
    """What an activation is of, and its name; None where it has none."""
    squared = is_call(node, aten.pow.Tensor_Scalar, aten.square.default) and node.kwargs.get("exponent", 2) == 2 and only_user(node) is not None
    inner = node.kwargs["self"] if squared else node
    if not is_call(inner, *ACTIVATIONS) or only_user(inner) is None:
        return None, ""
    name = ACTIVATIONS[inner.target] + ("_tanh" if inner.kwargs.get("approximate", "none") == "tanh" else "")
    return (inner.kwargs["self"], SQUARED.get(name, "") if squared else name) if not squared or name in SQUARED else (None, "")


def activation_of_ffn(region: Region, site: Site) -> str:
    """The name of an FFN's whole activation in ops.select_ffn.ACTIVATIONS; empty where it has none."""
    name = activation_of(neurons_of(region, site))[1]
    if "up_activation" not in site.roles:
        return name
    return RAISED.get(name, "") if is_call(region.node(site.roles["up_activation"]), aten.relu.default) else ""


def is_packed(node: fx.Node) -> bool:
    """An FFN that `pack` has packed, and that has no kernel yet."""
    return node.target is select_ffn.op and "kernel" not in node.meta


def pack(region: Region, down: fx.Node, found: Ffn, program: Program, by: str) -> None:
    """down(select(...) * up(x)) -> select_ffn(x, ...)."""
    weight = get_tensor(region.module, str(down.kwargs["weight"].target)).detach()  # type: ignore[union-attr]
    assert found.up is not None
    given = {"limit": found.select.kwargs["limit"], "gate": found.gate.kwargs["weight"], "up": found.up.kwargs["weight"],
             "down": by_input(region, down, by), "scale": found.select.kwargs.get("scale"), "gate_bias": found.gate.kwargs.get("bias"),
             "up_bias": found.up.kwargs.get("bias"), "bias": down.kwargs.get("bias")}
    kwargs = {name: node for name, node in given.items() if node is not None}
    with region.graph.inserting_before(down):
        packed = region.graph.call_function(select_ffn.op, (), {"x": found.up.kwargs["input"], **kwargs, "activation": found.activation})
    take_place(down, packed, by, optional=found.select.meta.get("optional", False))
    row_of(region, packed, "linear", weight, program).format = "by neuron"


def layer(region: Region, node: fx.Node, program: Program, ctx: Context) -> Linear:
    """The FFN at a node, its kernels built and ready to run with as many selected neurons as calibration found."""
    assert ctx.kernels is not None
    assert ctx.target is not None
    tensors, attributes, bias = operands(region, node)
    x = rows_of(region, node, ctx)
    layer = ffn_layer(region, node, x, tensors["down"].t(), program, ctx)
    layer.selects, bias_of_gate = True, tensors.get("gate_bias")
    gates = eager(tensors["gate"].float(), None if bias_of_gate is None else bias_of_gate.float(), x.float())  # as kernels and the op compute them
    limit = limit_of(select.score(select_ffn.hidden(str(attributes["activation"]), gates), tensors.get("scale")), layer.decision.density)
    expected = partial(select_ffn.op, x, **(tensors | {"limit": limit}), bias=bias, **attributes)
    for candidate, rival in zip(*(usable(ctx.kernels.candidates("select_ffn", tensors | other, attributes, x.dtype, (layer.rows,), ctx.target), ctx)
                                  for other in ({}, {"limit": limit})), strict=True):
        layer.add(candidate.name, bound(rival, bias, ctx), x, None, Form(False, bound(candidate, bias, ctx)), expected)
    return layer


def make_dense(layer: Linear) -> list[fx.Node]:
    """select_ffn -> the FFN with all of its neurons, or those that the model itself selects. Returns its linears."""
    region, node = layer.region, layer.node
    down = dense_weight(region, node, node.kwargs["down"], layer.weight)
    return insert_ffn(region, node, down, partial(as_selected, node))


def _stored(node: Any) -> bool:
    """A linear with a stored weight."""
    weight = node.kwargs.get("weight") if is_call(node, aten.linear.default) else None
    return isinstance(weight, fx.Node) and weight.op == "get_attr"
