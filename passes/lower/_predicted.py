"""FFNs whose neurons are chosen by predicted scores: packed into one op, and lowered to a kernel that reads the chosen weights only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.executor import part_function
from sparsify_compiler.fold import erase_dead
from sparsify_compiler.normal_form_edit import take_place
from sparsify_compiler.operands import operands
from sparsify_compiler.ops import predicted_ffn, select, select_linear
from sparsify_compiler.passes.lower._dense_ffn import ffn_layer, insert_ffn, size_of
from sparsify_compiler.passes.lower._layer import Form, bound, row_of, rows_of, say, usable
from sparsify_compiler.passes.lower._linear import Linear
from sparsify_compiler.passes.lower._selected import as_selected, by_input, choose, dense_weight
from sparsify_compiler.passes.lower._selected_ffn import Ffn, selecting
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, get_tensor

__all__ = ["choose", "find", "is_packed", "layer", "make_dense", "pack", "size_of"]

BY = "by prediction"  # how the decisions about such sites call their structure


def find(down: fx.Node) -> Ffn | None:
    """The FFN that ends at a linear and chooses its neurons by scores that are given; None where it is another, or computed otherwise."""
    found = selecting(down)
    return found if found is not None and found.select.kwargs.get("scores") is not None else None


def is_packed(node: fx.Node) -> bool:
    """An FFN that `pack` has packed, and that has no kernel yet."""
    return node.target is predicted_ffn.op and "kernel" not in node.meta


def pack(region: Region, down: fx.Node, found: Ffn, program: Program, by: str) -> None:
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
    row_of(region, packed, "linear", weight, program).format = BY


def layer(region: Region, node: fx.Node, program: Program, ctx: Context) -> Linear:
    """The FFN at a node, its kernels ready to run with as many chosen neurons as calibration found, and its predictor's time counted."""
    assert ctx.kernels is not None
    assert ctx.target is not None
    tensors, attributes, bias = operands(region, node)
    x = rows_of(region, node, ctx)
    layer = ffn_layer(region, node, x, tensors["down"].t(), program, ctx)
    predict = predictor(region, node, x)
    scores = torch.rand(x.shape[0], layer.weight.shape[1], generator=torch.Generator().manual_seed(ctx.seed), dtype=torch.float32)
    limit = torch.full((x.shape[0], 1), 1 - layer.decision.density, dtype=torch.float32)
    expected = partial(predicted_ffn.op, x, scores, limit, **{name: tensor for name, tensor in tensors.items() if name not in ("scores", "limit")},
                       bias=bias, **attributes)
    for candidate in usable(ctx.kernels.candidates("predicted_ffn", tensors, attributes, x.dtype, (layer.rows,), ctx.target), ctx):
        kernel = bound(candidate, bias, ctx)
        layer.add(candidate.name, partial(_after, predict, kernel, scores, limit), x, None, Form(False, kernel), expected)
    return layer


def _after(predict: Callable[[], object], kernel: Any, scores: Tensor, limit: Tensor, x: Tensor) -> Tensor:
    """The kernel behind its predictor; what that says of random rows counts for nothing."""
    predict()
    y: Tensor = kernel(x, scores, limit)
    return y


def predictor(region: Region, node: fx.Node, x: Tensor) -> Callable[[], object]:
    """What computes the scores, and a limit that is not stored, for these rows; what other FFNs share costs nothing."""
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
    given = [_shaped(one, x if one is node.kwargs["x"] else torch.zeros(x.shape[0], int(one.meta["val"].shape[-1]), dtype=one.meta["val"].dtype))
             for one in inputs]
    return partial(part_function(region, inputs, outputs), *given)


def _shaped(node: fx.Node, rows: Tensor) -> Tensor:
    """Rows with as many dimensions as a node's value, and its own ones where those are so many rows: what follows may have been captured for them."""
    *before, _ = node.meta["val"].shape
    own = all(isinstance(size, int) for size in before) and math.prod(before) == rows.shape[0]
    return rows.reshape(*(before if own else [*[1] * (len(before) - 1), rows.shape[0]]), rows.shape[1])


def make_dense(layer: Linear) -> list[fx.Node]:
    """predicted_ffn -> the FFN with all of its neurons, or those that the model itself chooses. Returns its linears."""
    region, node = layer.region, layer.node
    scores = [value for name in ("scores", "limit") if isinstance(value := node.kwargs[name], fx.Node) and value.op != "get_attr"]
    linears = insert_ffn(region, node, dense_weight(region, node, node.kwargs["down"], layer.weight), partial(as_selected, node))
    erase_dead(scores)
    return linears


def drop_unpacked(program: Program) -> None:
    """select(x, limit, scores) -> x, without what the scores are computed with, where no kernel reads by them; the model's own selections stay."""
    found = [node for _, node in program.nodes()
             if node.target is select.op and node.kwargs.get("scores") is not None and node.meta.get("optional")
             and not any(user.target is select_linear.op for user in node.users)]
    paths = {str(one.meta.get("site")) for node in found for one in (node, *node.users)}
    for node in found:
        node.replace_all_uses_with(node.kwargs["x"])  # type: ignore[arg-type]
        erase_dead([node])
    for row in program.decisions.values():
        if row.site not in paths:
            continue
        if row.structure.endswith(BY):
            row.density = 1.0
            say(row, "reads everything: no kernel reads by these predicted scores")
        else:   # a later pass has made it something else
            say(row, "what was predicted is read all the same: no kernel selects by scores and in this way too")
