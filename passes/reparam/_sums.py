"""Sums of several terms, brought into an order in which terms of the same source stand together: f(x) + z + g(x) is (f(x) + g(x)) + z."""

from __future__ import annotations

import torch
from torch import fx

from sparsify_compiler.passes.reparam._maps import inputs
from sparsify_compiler.passes.reparam._space import Space, named

aten = torch.ops.aten


def regroup_sums(space: Space, by: str) -> None:
    """Reorder every sum of three and more terms in which terms of one source are parted by others."""
    origins: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in list(space.region.graph.nodes):
        read = inputs(space, node)
        origins[node] = frozenset().union(*(origins[one] for one in read)) if read else frozenset({node})
    for node in reversed(list(space.region.graph.nodes)):
        if not node._erased and _is_sum(node) and not any(_is_sum(user) and len(node.users) == 1 for user in node.users):
            _regroup(space, node, origins, by)


def _is_sum(node: fx.Node) -> bool:
    if node.target is not aten.add.Tensor or named(node).get("alpha", 1) != 1:
        return False
    terms = [named(node)["self"], named(node)["other"]]
    return all(isinstance(term, fx.Node) and "val" in term.meta and term.meta["val"].shape == node.meta["val"].shape for term in terms)


def _terms(node: fx.Node, top: bool = True) -> list[fx.Node]:
    """The terms of a sum, through the sums that only it reads."""
    if not _is_sum(node) or (len(node.users) != 1 and not top):
        return [node]
    return [term for name in ("self", "other") for term in _terms(named(node)[name], False)]


def _regroup(space: Space, node: fx.Node, origins: dict[fx.Node, frozenset[fx.Node]], by: str) -> None:
    terms = _terms(node)
    groups: dict[frozenset[fx.Node], list[fx.Node]] = {}
    for term in terms:
        groups.setdefault(origins[term], []).append(term)
    if len(groups) < 2 or len(groups) == len(terms):
        return
    graph = space.region.graph

    def plus(one: fx.Node, other: fx.Node) -> fx.Node:
        with graph.inserting_before(node):
            made = graph.call_function(aten.add.Tensor, (), {"self": one, "other": other})
        made.meta = {k: v for k, v in node.meta.items() if k in ("path", "module", "val")} | {"by": by}
        origins[made] = origins[one] | origins[other]
        return made

    sums = []
    for group in groups.values():
        total = group[0]
        for term in group[1:]:
            total = plus(total, term)
        sums.append(total)
    total = sums[0]
    for part in sums[1:]:
        total = plus(total, part)
    node.replace_all_uses_with(total)
    graph.eliminate_dead_code()
