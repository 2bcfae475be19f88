"""FFNs: two linears with an activation between them, or three with a gate.

An activation may be more than one operator: a square behind it (ReLU²), a selection by magnitude (FATReLU), a scale and an offset (StarReLU).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from .normal_form_edit import aten, from_parameters, is_call, only_user, rank
from .ops import select
from .program import Region, Site
from .site_graph import ACTIVATIONS, View, common_path, features, path_of
from .site_linear import operator_name


@dataclass(frozen=True)
class _Ffn:
    up: fx.Node
    activation: fx.Node
    gate: fx.Node | None = None
    up_activation: fx.Node | None = None


def find_ffns(view: View) -> Iterator[tuple[fx.Node, Site]]:
    """Facts: gated, activation, in_features, hidden, out_features; fused when gate and up are one linear whose halves are split.

    The role up_activation is there where the up projection of a gated FFN has an activation too (dReLU).
    """
    linears = set(view.linears)
    taken: set[str] = set()
    for down in view.linears:
        found = _ffn(down.kwargs["input"], linears)
        if found is None:
            continue
        parts = [found.up, down] + ([found.gate] if found.gate is not None else [])
        source = found.up.kwargs["input"]
        assert isinstance(source, fx.Node)
        roles = {"input": source.name, "up": found.up.name, "activation": found.activation.name, "down": down.name}
        roles |= {"gate": found.gate.name} if found.gate is not None else {}
        roles |= {"up_activation": found.up_activation.name} if found.up_activation is not None else {}
        hidden, outputs = features(down)
        facts = {"gated": found.gate is not None, "activation": operator_name(found.activation), "in_features": features(found.up)[0],
                 "hidden": hidden, "out_features": outputs, "fused": found.gate is found.up}
        path = common_path(path_of(node) for node in parts)
        path = path_of(found.up) if not path or path in taken or found.up is down else path
        taken.add(path)
        yield found.up, Site("ffn", path, view.region.path, roles, facts)


def neurons_of(region: Region, site: Site) -> fx.Node:
    """What decides which neurons are alive: the activation of the gate where there is one, else what feeds the down projection."""
    if site.facts["gated"]:
        return activated(region.node(site.roles["activation"]))
    value = region.node(site.roles["down"]).kwargs["input"]
    assert isinstance(value, fx.Node)
    return value


def activated(activation: fx.Node) -> fx.Node:
    """The last node of the activation that begins with this operator."""
    after = _reader(activation)
    while after is not None and _inner(after) is activation:
        activation, after = after, _reader(after)
    return activation


def partner_of(region: Region, site: Site) -> fx.Node | None:
    """What the neurons are multiplied with before the down projection: the up projection of a gated FFN; None where there is no gate."""
    if not site.facts["gated"]:
        return None
    neurons, product = neurons_of(region, site), region.node(site.roles["down"]).kwargs["input"]
    assert isinstance(product, fx.Node)
    return next((value for value in product.all_input_nodes if value is not neurons), None)


def _ffn(node: object, linears: set[fx.Node]) -> _Ffn | None:
    """What feeds the down projection, if it is an activation of a linear, alone or times another linear of the same input."""
    plain = _activated(node, linears)
    if plain is not None:
        return _Ffn(plain[0], plain[1])
    while isinstance(node, fx.Node) and is_call(node, select.op) and (inner := _inner(node)) is not None:  # of the products
        node = inner
    if not isinstance(node, fx.Node) or not is_call(node, aten.mul.Tensor) or _reader(node) is None:
        return None
    a, b = node.kwargs["self"], node.kwargs["other"]
    for one, other in ((a, b), (b, a)):
        gate, up, both = _activated(one, linears), _projected(other, linears), _activated(other, linears)
        up, second = (up, None) if both is None else both
        if gate is not None and up is not None and gate[0].kwargs["input"] is up.kwargs["input"]:
            return _Ffn(up, gate[1], gate[0], second)
    return None


def _activated(node: object, linears: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """(linear, activation) when a node is an activation of a linear, or the last node of one."""
    while isinstance(node, fx.Node) and (inner := _inner(node)) is not None and _reader(node) is not None:
        node = inner
    if not isinstance(node, fx.Node) or not is_call(node, *ACTIVATIONS) or _reader(node) is None:
        return None
    linear = _projected(node.kwargs["self"], linears)
    return None if linear is None else (linear, node)


def _reader(node: fx.Node) -> fx.Node | None:
    """The only user; of a value that is selected, the selection, where the others do no more than find out its limit (top-k)."""
    chosen = [user for user in node.users if is_call(user, select.op) and user.kwargs["x"] is node]
    if len(chosen) != 1 or len(node.users) == 1:
        return only_user(node)
    limit, inside = chosen[0].kwargs["limit"], set[fx.Node]()
    waiting = [limit] if isinstance(limit, fx.Node) else []
    while waiting:
        one = waiting.pop()
        if one is not node and one not in inside:
            inside.add(one)
            waiting += one.all_input_nodes
    return chosen[0] if all(user is chosen[0] or user in inside for user in node.users) else None


def _inner(node: fx.Node) -> fx.Node | None:
    """x of a node that belongs to the activation of x: a square, a selection by magnitude, a scale, an offset."""
    x: object = None
    if is_call(node, aten.pow.Tensor_Scalar, aten.square.default) or (is_call(node, aten.mul.Tensor) and node.kwargs["self"] is node.kwargs["other"]):
        x = node.kwargs["self"]
    elif is_call(node, select.op) and node.kwargs.get("scale") is None and node.kwargs.get("center") is None:
        x = node.kwargs["x"]
    elif is_call(node, aten.mul.Tensor, aten.add.Tensor) and _is_number(node.kwargs["other"]):
        x = node.kwargs["self"]
    return x if isinstance(x, fx.Node) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, fx.Node) and rank(value) == 0 and from_parameters(value))


def _projected(node: object, linears: set[fx.Node]) -> fx.Node | None:
    """The linear that a value comes from, whole or as one part of a split; nobody else may read it."""
    if not isinstance(node, fx.Node) or only_user(node) is None:
        return None
    if node.target is operator.getitem:
        split = node.args[0]
        if not is_call(split, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default):
            return None
        node = split.kwargs["self"]
    return node if isinstance(node, fx.Node) and node in linears and only_user(node) is not None else None
