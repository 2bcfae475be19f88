"""Mixtures of experts that the model brings along: a router whose scores choose the top k of several experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from .normal_form_edit import argument, aten, is_call, shape
from .program import Site
from .site_graph import View, backwards, features, is_layout, path_of

_SCORES = (aten.softmax.int, aten.sigmoid.default, aten.add.Tensor, aten.log_softmax.int)


def find_moes(view: View) -> Iterator[tuple[fx.Node, Site]]:
    """Roles input, router (the linear that scores the experts), output. Facts: experts, top_k, and hidden where the experts are stacked."""
    linears = set(view.linears)
    for topk in view.calls(aten.topk.default):
        routers = backwards(argument(topk, "self"), linears.__contains__, lambda n: is_layout(n) or is_call(n, *_SCORES))
        chosen = topk.kwargs["k"]
        if not routers or not isinstance(chosen, int) or not 1 <= chosen < features(routers[0])[1]:
            continue
        router = routers[0]
        path = path_of(router).rpartition(".")[0] or path_of(router)
        inside = [node for node in view.position if path_of(node) == path or path_of(node).startswith(f"{path}.")]
        experts = features(router)[1]
        facts: dict[str, Any] = {"experts": experts, "top_k": chosen} | _stacked(inside, experts, features(router)[0])
        roles = {"router": router.name} | _ends(router, inside, view)
        yield router, Site("moe", path, view.region.path, roles, facts)


def _stacked(inside: list[fx.Node], experts: int, width: int) -> dict[str, Any]:
    """The hidden width, when one parameter holds that matrix of all experts."""
    for node in inside:
        sizes = shape(node)
        if node.op == "get_attr" and sizes is not None and len(sizes) == 3 and sizes[0] == experts and width in sizes[1:]:
            other = sizes[1] if sizes[2] == width else sizes[2]
            down = [s for s in (shape(n) for n in inside if n.op == "get_attr" and n is not node) if s is not None and len(s) == 3]
            return {"hidden": min([other, *(max(set(s[1:]) - {width}, default=other) for s in down)])}
    return {}


def _ends(router: fx.Node, inside: list[fx.Node], view: View) -> dict[str, str]:
    """What the router reads, before it is rearranged, and the last value that is read outside."""
    source = router.kwargs["input"]
    while isinstance(source, fx.Node) and is_layout(source) and source in inside:
        source = source.all_input_nodes[0]
    assert isinstance(source, fx.Node)
    members = set(inside)
    outputs = [node for node in inside if any(user not in members for user in node.users)]
    return {"input": source.name} | ({"output": max(outputs, key=view.position.__getitem__).name} if outputs else {})
