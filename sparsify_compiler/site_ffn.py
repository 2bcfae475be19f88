"""FFNs: two linears with an activation between them, or three with a gate."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from .normal_form_edit import aten, is_call, only_user
from .program import Region, Site
from .site_graph import ACTIVATIONS, View, common_path, features, path_of
from .site_linear import operator_name


@dataclass(frozen=True)
class _Ffn:
    up: fx.Node
    activation: fx.Node
    gate: fx.Node | None = None


def find_ffns(view: View) -> Iterator[tuple[fx.Node, Site]]:
    """Facts: gated, activation, in_features, hidden, out_features; fused when gate and up are one linear whose halves are split."""
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
        hidden, outputs = features(down)
        facts = {"gated": found.gate is not None, "activation": operator_name(found.activation), "in_features": features(found.up)[0],
                 "hidden": hidden, "out_features": outputs, "fused": found.gate is found.up}
        path = common_path(path_of(node) for node in parts)
        path = path_of(found.up) if not path or path in taken or found.up is down else path
        taken.add(path)
        yield found.up, Site("ffn", path, view.region.path, roles, facts)


def neurons_of(region: Region, site: Site) -> fx.Node:
    """What decides which neurons are alive: the activation of the gate where there is one, else what feeds the down projection."""
    value = region.node(site.roles["down"]).kwargs["input"]
    assert isinstance(value, fx.Node)
    if not site.facts["gated"]:
        return value
    activation = region.node(site.roles["activation"])
    squared = only_user(activation)
    return activation if squared is value or squared is None else squared


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
    if not is_call(node, aten.mul.Tensor) or only_user(node) is None:
        return None
    a, b = node.kwargs["self"], node.kwargs["other"]
    for one, other in ((a, b), (b, a)):
        gate = _activated(one, linears)
        up = _projected(other, linears)
        if gate is not None and up is not None and gate[0].kwargs["input"] is up.kwargs["input"]:
            return _Ffn(up, gate[1], gate[0])
    return None


def _activated(node: object, linears: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """(linear, activation) when a node is an activation of a linear; a square after it (ReLU²) belongs to it."""
    if is_call(node, aten.pow.Tensor_Scalar, aten.square.default) and only_user(node) is not None:
        node = node.kwargs["self"]
    if not isinstance(node, fx.Node) or not is_call(node, *ACTIVATIONS) or only_user(node) is None:
        return None
    linear = _projected(node.kwargs["self"], linears)
    return None if linear is None else (linear, node)


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
