"""Stretches of a model that run without gradients, `with torch.no_grad():` in its forward, in a graph that gradients pass through.

torch.export makes of each a graph of its own, under a higher-order operator. Here its nodes are among the others again, and what leaves it is
detached.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

WRAPPED = torch.ops.higher_order.wrap_with_set_grad_enabled
aten = torch.ops.aten


def inline_gradient_modes(exported: ExportedProgram) -> str | None:
    """Put the nodes of such stretches into the graph around them, in place. None, or why it cannot be done.

    A value that no parameter and no floating-point input leads to has no gradient, and is not detached: passes see through positions and masks.
    """
    module = exported.graph_module
    for node in [node for node in module.graph.nodes if node.target is WRAPPED]:
        reason = _inline(module, node, _with_gradients(exported)) if len(node.args) > 1 else None
        if reason is not None:
            return reason
    module.graph.eliminate_dead_code()
    return None


def _inline(module: fx.GraphModule, call: fx.Node, sources: set[fx.Node]) -> str | None:
    enabled, inner, *given = call.args
    assert isinstance(inner, fx.Node)
    graph = getattr(module, str(inner.target)).graph
    places = [node for node in graph.nodes if node.op == "placeholder"]
    made: dict[fx.Node, Any] = dict(zip(places, given, strict=True))
    if not enabled and (written := _written(graph, {place for place, one in made.items() if one in sources})):
        return f"it writes to {written.name!r}, which has gradients, where it has switched them off"
    with module.graph.inserting_before(call):
        for node in graph.nodes:
            if node.op not in ("placeholder", "output"):
                made[node] = module.graph.node_copy(node, made.__getitem__)
                made[node].meta = dict(node.meta)
        leaving = [_leaving(module.graph, made[one], one not in places and not enabled and any(value in sources for value in given))
                   if isinstance(one, fx.Node) else one for one in graph.output_node().args[0]]
    for user in list(call.users):
        at = user.args[1]
        assert user.target is operator.getitem
        assert isinstance(at, int)
        user.replace_all_uses_with(leaving[at])
        module.graph.erase_node(user)
    module.graph.erase_node(call)
    return None


def _leaving(graph: fx.Graph, node: fx.Node, detached: bool) -> fx.Node:
    """A value as the graph around reads it."""
    value = node.meta.get("val")
    if not detached or not isinstance(value, Tensor) or not value.is_floating_point():
        return node
    made = graph.call_function(aten.detach.default, (node,))
    made.meta = dict(node.meta)
    return made


def _with_gradients(exported: ExportedProgram) -> set[fx.Node]:
    """The nodes that a parameter or a floating-point input leads to."""
    lifted = {spec.arg.name: spec.kind for spec in exported.graph_signature.input_specs}
    found: set[fx.Node] = set()
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            kind, value = lifted.get(node.name), node.meta.get("val")
            given = kind is InputKind.USER_INPUT and isinstance(value, Tensor) and value.is_floating_point()
            if given or kind is InputKind.PARAMETER:
                found.add(node)
        elif node.target is not aten.detach.default and any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _written(graph: fx.Graph, sources: set[fx.Node]) -> fx.Node | None:
    """Of these inputs of a graph, one whose memory the graph writes to."""
    shared = {one: one for one in sources}
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and value in shared:
                if argument.alias_info.is_write:
                    return shared[value]
                shared[node] = shared[value]
    return None
