"""FFNs whose neurons are chosen by predicted scores: packed into one op, and lowered to a kernel that reads the chosen weights only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.executor import part_function
from sparsify_compiler.fold import erase_dead
from sparsify_compiler.normal_form_edit import aten, insert, is_call, only_user, take_place
from sparsify_compiler.operands import operands
from sparsify_compiler.ops import predicted_ffn, select, select_ffn
from sparsify_compiler.passes.lower._dense_ffn import add_dense
from sparsify_compiler.passes.lower._held import size_of
from sparsify_compiler.passes.lower._layer import Form, row_of, rows_of, say
from sparsify_compiler.passes.lower._linear import Linear
from sparsify_compiler.passes.lower._selected import by_input, choose, dense_weight
from sparsify_compiler.passes.lower._selected_ffn import RAISED, activation_of, stored
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, get_tensor
from sparsify_compiler.splice import insert_formula

__all__ = ["choose", "find", "is_packed", "layer", "make_dense", "pack", "size_of"]

BY = "by prediction"  # how the decisions about such sites call their structure


@dataclass(frozen=True)
class _Ffn:
    """The nodes of down(select(activation(gate(x)), limit, scores) * up(x)), or without up."""

    gate: Any
    up: Any | None
    activation: str
    select: Any


def find(down: fx.Node) -> _Ffn | None:
    """The FFN that ends at a linear; None where it is another, or computed otherwise."""
    source = down.kwargs.get("input") if stored(down) else None
    if not isinstance(source, fx.Node) or only_user(source) is None:
        return None
    pairs: list[tuple[Any, Any]] = [(source, None)]
    if is_call(source, aten.mul.Tensor):
        one, other = source.kwargs["self"], source.kwargs["other"]
        pairs = [(one, other), (other, one)]
    for chosen, up in pairs:
        if not is_call(chosen, select.op) or chosen.kwargs.get("scores") is None or only_user(chosen) is None:
            continue
        gate, name = activation_of(chosen.kwargs["x"])
        if is_call(up, aten.relu.default) and name in RAISED and only_user(up) is not None:
            up, name = up.kwargs["self"], RAISED[name]
        fits = name and stored(gate) and only_user(gate) is not None
        if fits and (up is None or (stored(up) and only_user(up) is not None and up.kwargs["input"] is gate.kwargs["input"])):
            return _Ffn(gate, up, name, chosen)
    return None


def is_packed(node: fx.Node) -> bool:
    """An FFN that `pack` has packed, and that has no kernel yet."""
    return node.target is predicted_ffn.op and "kernel" not in node.meta


def pack(region: Region, down: fx.Node, found: _Ffn, program: Program, by: str) -> None:
    """down(select(...) * up(x)) -> predicted_ffn(x, scores, ...)."""
    weight = get_tensor(region.module, str(down.kwargs["weight"].target)).detach()  # type: ignore[union-attr]
    up: Mapping[str, Any] = {} if found.up is None else found.up.kwargs
    given = {"gate": found.gate.kwargs["weight"], "down": by_input(region, down, by), "up": up.get("weight"),
             "gate_bias": found.gate.kwargs.get("bias"), "up_bias": up.get("bias"), "bias": down.kwargs.get("bias")}
    kwargs = {"x": found.gate.kwargs["input"], "scores": found.select.kwargs["scores"], "limit": found.select.kwargs["limit"],
              **{name: node for name, node in given.items() if node is not None}}
    with region.graph.inserting_before(down):
        packed = region.graph.call_function(predicted_ffn.op, (), {**kwargs, "activation": found.activation})
    take_place(down, packed, by, optional=found.select.meta.get("optional", False))
    row_of(region, packed, "linear", weight, program).format = "by neuron"


def layer(region: Region, node: fx.Node, program: Program, ctx: Context) -> Linear:
    """The FFN at a node, its kernels ready to run with as many chosen neurons as calibration found, and its predictor's time counted."""
    assert ctx.kernels is not None
    assert ctx.target is not None
    tensors, attributes, bias = operands(region, node)
    x = rows_of(region, node, ctx)
    weight = tensors["down"].t()
    layer = Linear(region, node, row_of(region, node, "linear", weight, program), weight, bias, packed=True, rows=x.shape[0])
    biases = {"gate": tensors.get("gate_bias"), "up": tensors.get("up_bias"), "down": bias}
    dense = {name: (weight if name == "down" else tensors[name], biases[name]) for name in biases if name in tensors}
    add_dense(layer, dense, str(attributes["activation"]), x, ctx)
    predict = _predictor(region, node, x)
    scores = torch.rand(x.shape[0], weight.shape[1], generator=torch.Generator().manual_seed(ctx.seed), dtype=torch.float32)
    limit = torch.full((x.shape[0], 1), 1 - layer.decision.density, dtype=torch.float32)
    for candidate in ctx.kernels.candidates("predicted_ffn", tensors, attributes, x.dtype, (layer.rows,), ctx.target):
        kernel = candidate.bind(bias)
        layer.add(candidate.name, partial(_after, predict, kernel, scores, limit), x, None, Form(False, kernel))
    return layer


def _after(predict: Callable[[Tensor], object], kernel: Any, scores: Tensor, limit: Tensor, x: Tensor) -> Tensor:
    """The kernel behind its predictor; what that says of random rows counts for nothing."""
    predict(x)
    y: Tensor = kernel(x, scores, limit)
    return y


def _predictor(region: Region, node: fx.Node, x: Tensor) -> Callable[[Tensor], object]:
    """What computes the scores, and a limit that is not stored; what it shares with other FFNs (a first layer for all) costs nothing here."""
    outputs = [value for name in ("scores", "limit") if isinstance(value := node.kwargs[name], fx.Node) and value.op != "get_attr"]
    own, inputs, waiting = {node}, list[fx.Node](), list(outputs)
    while waiting:
        one = waiting.pop()
        if one in own or one in inputs or one.op == "get_attr":
            continue
        if one.op != "placeholder" and all(user in own for user in one.users):
            own.add(one)
            waiting += one.all_input_nodes
        else:
            inputs.append(one)
    given = [x if one is node.kwargs["x"] else _like(one, x) for one in inputs]
    run = part_function(region, inputs, outputs)
    shaped = [value.reshape(*[1] * (one.meta["val"].dim() - 2), *value.shape) for one, value in zip(inputs, given, strict=True)]
    return lambda x: run(*shaped)


def _like(node: fx.Node, x: Tensor) -> Tensor:
    value = node.meta["val"]
    return torch.zeros(x.shape[0], int(value.shape[-1]), dtype=value.dtype)


def make_dense(layer: Linear) -> list[fx.Node]:
    """predicted_ffn -> the FFN with all of its neurons, or those that the model itself chooses. Returns its linears."""
    region, node = layer.region, layer.node
    given: Any = node.kwargs
    linears: list[fx.Node] = []

    def linear(x: Any, weight: Any, bias: str) -> fx.Node:
        made = insert(node, aten.linear.default, input=x, weight=weight, **({"bias": given[bias]} if bias in given else {}))
        made.meta["by"] = "lower"
        linears.append(made)
        return made

    inputs = {"first": linear(given["x"], given["gate"], "gate_bias")}
    inputs |= {"up": linear(given["x"], given["up"], "up_bias")} if "up" in given else {}
    hidden = insert_formula(region, node, partial(select_ffn.hidden, given["activation"]), inputs, "lower")
    if not node.meta.get("optional"):
        hidden = insert(node, select.op, x=hidden, limit=given["limit"], scores=given["scores"])
    down = linear(hidden, dense_weight(region, node, given["down"], layer.weight), "bias")
    scores = [value for name, value in given.items() if name in ("scores", "limit") and value.op != "get_attr"]
    take_place(node, down, "lower")
    erase_dead(scores)
    return linears


def drop_unpacked(program: Program) -> None:
    """select(x, limit, scores) -> x, without what the scores are computed with, where no kernel reads by them; the model's own selections stay."""
    found = [node for _, node in program.nodes()
             if node.target is select.op and node.kwargs.get("scores") is not None and node.meta.get("optional")]
    paths = {str(user.meta.get("site")) for node in found for user in node.users}
    for node in found:
        node.replace_all_uses_with(node.kwargs["x"])  # type: ignore[arg-type]
        erase_dead([node])
    for row in program.decisions.values():
        if row.structure.endswith(BY) and row.site in paths:
            row.density = 1.0
            say(row, "reads everything: no kernel reads by these predicted scores")
