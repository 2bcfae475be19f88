"""In-place calls → functional ones, where the written tensor has no other name that is read later."""

from __future__ import annotations

import operator
from typing import TypeGuard

import torch
from torch import fx

from .normal_form_edit import Call, NotFunctionalError, Overload, aten, infer, insert, value


def mutates(node: fx.Node) -> TypeGuard[Call]:
    """Whether a call writes into one of its arguments."""
    return node.op == "call_function" and isinstance(node.target, Overload) and node.target._schema.is_mutable


def functionalise(graph: fx.Graph) -> bool:
    """Replace every in-place call. True when the graph changed. Raises NotFunctionalError, leaving a graph that is still correct."""
    changed = False
    for node in list(graph.nodes):
        if mutates(node):
            _functional(graph, node)
            changed = True
    return changed


def _functional(graph: fx.Graph, node: Call) -> None:
    written = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    target = _functional_overload(node.target)
    first = node.target._schema.arguments[0].name
    victim = node.args[0] if node.args else node.kwargs.get(first)
    if target is None or written != [first] or not isinstance(victim, fx.Node):
        raise NotFunctionalError(f"it uses {node.target}, which writes in place")
    order = {n: i for i, n in enumerate(graph.nodes)}
    for other in _same_storage(victim, node):
        if other.op in ("placeholder", "get_attr"):
            whose = "its input" if other.op == "placeholder" else "its parameter or buffer"
            raise NotFunctionalError(f"it writes to {whose} {other.target} in place")
        if other is not victim and any(order[user] >= order[node] for user in other.users):
            raise NotFunctionalError("it writes to a tensor that it later reads under another name")
    named = {a.name: v for a, v in zip(target._schema.arguments, node.args, strict=False)} | dict(node.kwargs)
    fake = infer(target, named)
    new = insert(node, target, fake, **named)
    new.meta = dict(node.meta) | ({"val": fake} if fake is not None else {})
    new = _keep_dtype(node, victim, new)
    for user in [u for u in victim.users if order.get(u, -1) > order[node]]:
        user.replace_input_with(victim, new)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _keep_dtype(node: fx.Node, victim: fx.Node, new: fx.Node) -> fx.Node:
    """An in-place call keeps the dtype of what it writes to; a functional one may promote it."""
    before, after = value(victim), value(new)
    if before is None or after is None or before.dtype == after.dtype:
        return new
    return insert(node, aten.to.dtype, self=new, dtype=before.dtype)


def _functional_overload(target: Overload) -> Overload | None:
    namespace, _, name = target._schema.name.partition("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    overload = None if packet is None else getattr(packet, target._overloadname, None)
    return overload if isinstance(overload, Overload) and not overload._schema.is_mutable else None


def _same_storage(node: fx.Node, write: fx.Node) -> set[fx.Node]:
    """Nodes that may share memory with `node`: what it is a view of, and the views of that, save what comes out of the write itself."""
    group, pending = set(), [node]
    while pending:
        current = pending.pop()
        if current not in group and current is not write:
            group.add(current)
            pending += _bases(current)
            pending += [user for user in current.users if current in _bases(user)]
    return group


def _bases(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory a call's result may share."""
    if node.op != "call_function":
        return []
    if node.target is operator.getitem:
        several = node.args[0]
        return [several] if isinstance(several, fx.Node) and _bases(several) else []
    if not isinstance(node.target, Overload):
        return []
    schema = node.target._schema
    if not any(r.alias_info is not None for r in schema.returns):
        return []
    aliased = {a.name for a in schema.arguments if a.alias_info is not None}
    given = {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)} | dict(node.kwargs)
    return [v for name, v in given.items() if name in aliased and isinstance(v, fx.Node) and not _converted(v, node)]


def _converted(source: fx.Node, node: fx.Node) -> bool:
    """Whether a cast really made a new tensor."""
    before, after = value(source), value(node)
    return before is not None and after is not None and before.dtype != after.dtype
