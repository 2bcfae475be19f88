"""Gated FFNs of which every row selects its neurons: packed into one op, and lowered to a kernel that reads the selected weights only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx

from sparsify_compiler.normal_form_edit import aten, insert, is_call, only_user, take_place
from sparsify_compiler.operands import operands
from sparsify_compiler.ops import select, select_ffn
from sparsify_compiler.passes.lower._dense_ffn import add_dense
from sparsify_compiler.passes.lower._layer import Form, row_of, rows_of
from sparsify_compiler.passes.lower._linear import Linear, eager
from sparsify_compiler.passes.lower._selected import as_selected, by_input, choose, dense_weight
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, Site, get_tensor
from sparsify_compiler.site_ffn import neurons_of
from sparsify_compiler.splice import insert_formula

__all__ = ["choose", "find", "is_packed", "layer", "make_dense", "pack", "size_of"]  # it is chosen by what a layer is chosen by

ACTIVATIONS = {aten.silu.default: "silu", aten.relu.default: "relu", aten.sigmoid.default: "sigmoid", aten.gelu.default: "gelu"}
SQUARED, RAISED = {"relu": "relu2"}, {"relu": "drelu"}  # names of the whole, by the activation that is squared, and that up has too


@dataclass(frozen=True)
class _Ffn:
    """The nodes of down(select(activation(gate(x))) * up(x))."""

    gate: Any
    up: Any
    activation: str
    select: Any


def find(down: fx.Node) -> _Ffn | None:
    """The FFN that ends at a linear; None where it is another, or computed otherwise."""
    product = down.kwargs.get("input") if stored(down) else None
    if not is_call(product, aten.mul.Tensor) or only_user(product) is None:
        return None
    one, other = product.kwargs["self"], product.kwargs["other"]
    for chosen, up in ((one, other), (other, one)):
        if not is_call(chosen, select.op) or only_user(chosen) is None:
            continue
        gate, name = activation_of(chosen.kwargs["x"])
        if is_call(up, aten.relu.default) and name in RAISED and only_user(up) is not None:
            up, name = up.kwargs["self"], RAISED[name]
        if not stored(up) or only_user(up) is None:
            continue
        fits = stored(gate) and only_user(gate) is not None and gate.kwargs["input"] is up.kwargs["input"]
        plain = chosen.kwargs["limit"].op == "get_attr" and chosen.kwargs.get("center") is None and chosen.kwargs.get("scores") is None
        if fits and plain:
            return _Ffn(gate, up, name, chosen)
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


def pack(region: Region, down: fx.Node, found: _Ffn, program: Program, by: str) -> None:
    """down(select(...) * up(x)) -> select_ffn(x, ...)."""
    weight = get_tensor(region.module, str(down.kwargs["weight"].target)).detach()  # type: ignore[union-attr]
    given = {"limit": found.select.kwargs["limit"], "gate": found.gate.kwargs["weight"], "up": found.up.kwargs["weight"],
             "down": by_input(region, down, by), "scale": found.select.kwargs.get("scale"), "gate_bias": found.gate.kwargs.get("bias"),
             "up_bias": found.up.kwargs.get("bias"), "bias": down.kwargs.get("bias")}
    kwargs = {name: node for name, node in given.items() if node is not None}
    with region.graph.inserting_before(down):
        packed = region.graph.call_function(select_ffn.op, (), {"x": found.up.kwargs["input"], **kwargs, "activation": found.activation})
    take_place(down, packed, by, optional=found.select.meta.get("optional", False))
    row_of(region, packed, "linear", weight, program).format = "by neuron"


def size_of(region: Region, node: fx.Node) -> int:
    """Bytes of the three weights."""
    values = [node.kwargs[name].meta["val"] for name in ("gate", "up", "down")]  # type: ignore[union-attr]
    return sum(int(value.numel() * value.element_size()) for value in values)


def layer(region: Region, node: fx.Node, program: Program, ctx: Context) -> Linear:
    """The FFN at a node, its kernels built and ready to run with as many selected neurons as calibration found."""
    assert ctx.kernels is not None
    assert ctx.target is not None
    tensors, attributes, bias = operands(region, node)
    x = rows_of(region, node, ctx)
    weight = tensors["down"].t()
    layer = Linear(region, node, row_of(region, node, "linear", weight, program), weight, bias, packed=True, rows=x.shape[0])
    dense = {"gate": (tensors["gate"], tensors.get("gate_bias")), "up": (tensors["up"], tensors.get("up_bias")), "down": (weight, bias)}
    name = str(attributes["activation"])
    add_dense(layer, dense, name, x, ctx)
    scores = select.score(select_ffn.hidden(name, eager(*dense["gate"], x)), tensors.get("scale")).flatten()
    skipped = round((1 - layer.decision.density) * scores.numel())
    limit = scores.kthvalue(min(skipped + 1, scores.numel())).values.float()
    for candidate, rival in zip(*(ctx.kernels.candidates("select_ffn", tensors | other, attributes, x.dtype, (layer.rows,), ctx.target)
                                  for other in ({}, {"limit": limit})), strict=True):
        layer.add(candidate.name, rival.bind(bias), x, None, Form(False, candidate.bind(bias)))
    return layer


def make_dense(layer: Linear) -> list[fx.Node]:
    """select_ffn -> the FFN with all of its neurons, or those that the model itself selects. Returns its linears."""
    region, node = layer.region, layer.node
    given: Any = node.kwargs
    name = given["activation"]
    linears = []

    def linear(x: Any, weight: Any, bias: Any) -> fx.Node:
        made = insert(node, aten.linear.default, input=x, weight=weight, **({} if bias is None else {"bias": bias}))
        linears.append(made)
        return made

    gate = linear(given["x"], given["gate"], given.get("gate_bias"))
    gates = insert_formula(region, node, lambda x: select_ffn.ACTIVATIONS[name](x), {"x": gate}, "lower")
    up = linear(given["x"], given["up"], given.get("up_bias"))
    raised = insert_formula(region, node, partial(select_ffn.raised, name), {"up": up}, "lower") if name in select_ffn.UP else up
    product = insert(node, aten.mul.Tensor, self=as_selected(node, gates), other=raised)
    down = linear(product, dense_weight(region, node, given["down"], layer.weight), given.get("bias"))
    for made in (product, *linears):
        made.meta["by"] = "lower"
    take_place(node, down, "lower")
    return linears


def stored(node: Any) -> bool:
    """A linear with a stored weight."""
    weight = node.kwargs.get("weight") if is_call(node, aten.linear.default) else None
    return isinstance(weight, fx.Node) and weight.op == "get_attr"
