"""Linears and convolutions: every product of an activation with a parameter."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from .normal_form_edit import argument, aten, is_call, only_user, shape
from .program import Site
from .site_graph import ACTIVATIONS, View, features, path_of, weight_of


def find_linears(view: View) -> Iterator[tuple[fx.Node, Site]]:
    """One site a call. Facts: in_features, out_features, bias, weight (its name in the region)."""
    for node in view.linears:
        inputs, outputs = features(node)
        facts = {"in_features": inputs, "out_features": outputs, "bias": argument(node, "bias") is not None, "weight": weight_of(node)}
        yield node, Site("linear", _path(node, view), view.region.path, {"op": node.name}, facts)


def find_convs(view: View) -> Iterator[tuple[fx.Node, Site]]:
    """A convolution with what belongs to its block: roles norm and activation where they follow it directly.

    Facts: in_channels, out_channels, kernel, stride, padding, groups, depthwise, bias, weight, norm and activation (names of the operators).
    """
    for node in view.convolutions:
        sizes = shape(node.kwargs["weight"])
        if sizes is None:
            continue
        roles, last = {"op": node.name}, node
        facts = {"in_channels": sizes[1] * argument(node, "groups"), "out_channels": sizes[0], "kernel": tuple(sizes[2:]),
                 "stride": tuple(argument(node, "stride")), "padding": tuple(argument(node, "padding")), "groups": argument(node, "groups"),
                 "depthwise": sizes[1] == 1 and argument(node, "groups") > 1, "bias": argument(node, "bias") is not None, "weight": weight_of(node)}
        for role, targets in (("norm", {aten.batch_norm.default}), ("activation", ACTIVATIONS)):
            after = only_user(last)
            if after is not None and is_call(after, *targets):
                roles[role], last = after.name, after
                facts[role] = operator_name(after)
        yield node, Site("conv", _path(node, view), view.region.path, roles, facts)


def _path(node: fx.Node, view: View) -> str:
    """The module that ran it; the one below that owns the weight where the module calls a function on another's weight (MultiheadAttention)."""
    path, owner = path_of(node), view.region.qualified(weight_of(node)).rpartition(".")[0]
    return owner if owner.startswith(f"{path}." if path else "") else path


def operator_name(node: fx.Node) -> str:
    """The plain name of an aten operator: "gelu"."""
    return str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")
