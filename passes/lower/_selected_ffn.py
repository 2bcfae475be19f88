"""Gated FFNs of which every row selects its neurons: packed into one op, and lowered to a kernel that reads the selected weights only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx

from sparsify_compiler.normal_form_edit import aten, insert, is_call, only_user
from sparsify_compiler.operands import operands
from sparsify_compiler.ops import select, select_ffn
from sparsify_compiler.passes.lower._layer import EAGER, Form, row_of
from sparsify_compiler.passes.lower._linear import Linear, eager
from sparsify_compiler.passes.lower._selected import by_input, dense_weight, rows_of
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, get_tensor

ACTIVATIONS = {aten.silu.default: "silu", aten.relu.default: "relu", aten.sigmoid.default: "sigmoid"}
TARGETS = {name: target for target, name in ACTIVATIONS.items()}


@dataclass(frozen=True)
class _Ffn:
    """The nodes of down(select(activation(gate(x))) * up(x))."""

    gate: Any
    up: Any
    activation: str
    select: Any


def find(down: fx.Node) -> _Ffn | None:
    """The FFN that ends at a linear; None where it is another, or computed otherwise."""
    product = down.kwargs.get("input") if _stored(down) else None
    if not is_call(product, aten.mul.Tensor) or only_user(product) is None:
        return None
    one, other = product.kwargs["self"], product.kwargs["other"]
    for chosen, up in ((one, other), (other, one)):
        if not is_call(chosen, select.op) or only_user(chosen) is None or not _stored(up) or only_user(up) is None:
            continue
        activated = chosen.kwargs["x"]
        gate: Any = activated.kwargs.get("self") if is_call(activated, *ACTIVATIONS) and only_user(activated) is not None else None
        fits = _stored(gate) and only_user(gate) is not None and gate.kwargs["input"] is up.kwargs["input"]
        plain = chosen.kwargs["limit"].op == "get_attr" and chosen.kwargs.get("center") is None
        if fits and plain:
            return _Ffn(gate, up, ACTIVATIONS[activated.target], chosen)
    return None


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
    packed.meta = {**down.meta, "by": by}
    down.replace_all_uses_with(packed)
    region.graph.erase_node(down)
    packed.name = down.name  # sites know their nodes by name
    row_of(region, packed, "linear", weight, program).format = "by neuron"


def size_of(region: Region, node: fx.Node) -> int:
    """Bytes of the three weights."""
    values = [node.kwargs[name].meta["val"] for name in ("gate", "up", "down")]  # type: ignore[union-attr]
    return sum(int(value.numel() * value.element_size()) for value in values)


def ffn(region: Region, node: fx.Node, program: Program, ctx: Context) -> Linear:
    """The FFN at a node, its kernels built and ready to run with as many selected neurons as calibration found."""
    assert ctx.kernels is not None
    assert ctx.target is not None
    tensors, attributes, bias = operands(region, node)
    x = rows_of(region, node, ctx)
    weight = tensors["down"].t()
    layer = Linear(region, node, row_of(region, node, "linear", weight, program), weight, bias, packed=True, rows=x.shape[0])
    dense = [(tensors["gate"], tensors.get("gate_bias")), (tensors["up"], tensors.get("up_bias")), (weight, bias)]
    activate = select_ffn.ACTIVATIONS[attributes["activation"]]
    linears: list[Callable[[Tensor], Tensor]] = [partial(eager, matrix, vector) for matrix, vector in dense]
    layer.add(EAGER, partial(_gated, linears, activate), x, None, Form())
    found = [ctx.kernels.candidates("linear", {"weight": matrix}, {"any_rows": True}, x.dtype, (layer.rows,), ctx.target) for matrix, _ in dense]
    if all(found):
        packed = [candidates[0].bind(vector) for candidates, (_, vector) in zip(found, dense, strict=True)]
        layer.add(found[0][0].name, partial(_gated, packed, activate), x, None, Form())
    scores = select.score(activate(linears[0](x)), tensors.get("scale")).flatten()
    skipped = round((1 - layer.decision.density) * scores.numel())
    limit = scores.kthvalue(min(skipped + 1, scores.numel())).values.float()
    for candidate, rival in zip(*(ctx.kernels.candidates("select_ffn", tensors | other, attributes, x.dtype, (layer.rows,), ctx.target)
                                  for other in ({}, {"limit": limit})), strict=True):
        layer.add(candidate.name, rival.bind(bias), x, None, Form(False, candidate.bind(bias)))
    return layer


def make_dense(layer: Linear) -> list[fx.Node]:
    """select_ffn -> the FFN with all of its neurons. Returns its linears."""
    region, node = layer.region, layer.node
    given: Any = node.kwargs
    linears = []

    def linear(x: Any, weight: Any, bias: Any) -> fx.Node:
        made = insert(node, aten.linear.default, input=x, weight=weight, **({} if bias is None else {"bias": bias}))
        linears.append(made)
        return made

    gate = linear(given["x"], given["gate"], given.get("gate_bias"))
    gates = insert(node, TARGETS[given["activation"]], self=gate)
    product = insert(node, aten.mul.Tensor, self=gates, other=linear(given["x"], given["up"], given.get("up_bias")))
    down = linear(product, dense_weight(region, node, given["down"], layer.weight), given.get("bias"))
    for made in (gate, gates, product, *linears):
        made.meta["by"] = "lower"
    down.meta = {**node.meta, "by": "lower"}
    node.replace_all_uses_with(down)
    region.graph.erase_node(node)
    down.name = node.name
    return linears


def _stored(node: Any) -> bool:
    weight = node.kwargs.get("weight") if is_call(node, aten.linear.default) else None
    return isinstance(weight, fx.Node) and weight.op == "get_attr"


def _gated(linears: list[Callable[[Tensor], Tensor]], activate: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    gate, up, down = linears
    return down(activate(gate(x)) * up(x))
