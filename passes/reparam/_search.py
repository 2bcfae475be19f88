"""Which values of a region of affine ops are computed, and from which other values: the cheapest way, found by dynamic programming.

Every value in a region can be kept as it is, or computed by one op from any earlier value that determines it alone. What is needed outside of
the region has to be computed; what is computed for one use is free for the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, fx

from sparsify_compiler.cost import Cost, node_cost, total
from sparsify_compiler.passes.reparam._affine import Affine, identity
from sparsify_compiler.passes.reparam._emit import Emission, emission
from sparsify_compiler.passes.reparam._lattice import Inexact
from sparsify_compiler.passes.reparam._maps import apply, inputs
from sparsify_compiler.passes.reparam._space import Space

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, eq=False)
class Collapse:
    """One op in the place of several: from the value of `source` to that of `target`."""

    source: fx.Node
    target: fx.Node
    plan: Emission
    dying: tuple[fx.Node, ...]  # ops that will no longer run, in the order of execution
    before: Cost

    @property
    def what(self) -> str:
        return " + ".join(node.name for node in self.dying)


Choice = Collapse | None  # None: the op stays
Way = dict[fx.Node, Choice]


@dataclass
class Component:
    """A maximal connected region of affine ops, read in one layout."""

    space: Space
    graph: nx.DiGraph[fx.Node]  # values, with an edge from each to the ops that read it
    order: dict[fx.Node, int]
    maps: dict[fx.Node, dict[fx.Node, Affine]] = field(default_factory=dict)  # source -> value -> map
    refused: dict[tuple[fx.Node, fx.Node], str] = field(default_factory=dict)  # (source, target) -> why there is no such collapse
    edges: dict[tuple[fx.Node, fx.Node], Collapse | None] = field(default_factory=dict)
    earlier: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)

    @property
    def ops(self) -> list[fx.Node]:
        """The affine ops, in the order of execution."""
        return sorted((node for node in self.graph if self.graph.in_degree(node)), key=self.order.__getitem__)

    @property
    def needed(self) -> list[fx.Node]:
        """Ops whose values are read outside of the region."""
        return [node for node in self.ops if any(not self.graph.has_edge(node, user) for user in _users(node)) or not node.users]

    def _before(self, node: fx.Node) -> set[fx.Node]:
        """The values that a value is computed from."""
        from networkx import ancestors

        if node not in self.earlier:
            self.earlier[node] = ancestors(self.graph, node)
        return self.earlier[node]

    def _after(self, node: fx.Node) -> set[fx.Node]:
        """The values that are computed from a value."""
        from networkx import descendants

        found: set[fx.Node] = descendants(self.graph, node)
        return found

    def follow(self, source: fx.Node) -> dict[fx.Node, Affine]:
        """Value -> its map from the source, for all values that the source alone determines."""
        if source not in self.maps:
            found = {source: identity(int(source.meta["val"].shape[self.space.dim(source.meta["val"])]), self.space.places(source))}
            for node in self.ops:
                read = list(self.graph.predecessors(node))
                if node is not source and all(one in found for one in read):
                    try:
                        found[node] = apply(self.space, node, found)
                    except Inexact as reason:
                        self.refused[source, node] = f"{node.name}: {reason}"
            self.maps[source] = found
        return self.maps[source]

    def collapse(self, source: fx.Node, target: fx.Node) -> Collapse | None:
        """The collapse between two values, or None where it would gain nothing; `refused` says why."""
        key = (source, target)
        if key not in self.edges:
            self.edges[key] = self._collapse(source, target)
        return self.edges[key]

    def _collapse(self, source: fx.Node, target: fx.Node) -> Collapse | None:
        affine = self.follow(source).get(target)
        if affine is None:
            return None
        between = (self._after(source) & self._before(target)) | {target}
        dying = self._dying(between, target)
        plan = emission(affine, source.meta["val"], target.meta["val"])
        before = total(dying)
        made = Collapse(source, target, plan, tuple(sorted(dying, key=self.order.__getitem__)), before)
        raised = plan.cost.dearer(before)
        if raised is not None and before.bytes > 0 and len(between) > 1:
            kept = sorted((node for node in between if node not in dying), key=self.order.__getitem__)
            used = f"{kept[-1].name} is also used by {self._other_user(kept[-1], between)}: " if kept else ""
            self.refused[source, target] = f"{used}{made.what} as one {plan.kind} would raise {raised}"
        ran = sum(node_cost(node).bytes > 0 for node in dying)
        gains = len(between) > 1 and (plan.nodes < ran or plan.cost.work < before.work)
        return made if raised is None and gains else None

    def _dying(self, between: Iterable[fx.Node], target: fx.Node) -> set[fx.Node]:
        """The ops that nothing needs once the target is computed otherwise."""
        between, dying = set(between), {target}
        for node in sorted(between, key=self.order.__getitem__, reverse=True):
            if all(user in dying for user in _users(node)):
                dying.add(node)
        return dying

    def _other_user(self, node: fx.Node, between: set[fx.Node]) -> str:
        return next((user.name for user in _users(node) if user not in between), "the output")

    def solve(self) -> Way:
        """Every value that is to be computed, with how."""
        way: Way = {}
        done = {node for node in self.graph if not self.graph.in_degree(node)}
        for target in self.needed:
            found = self._best(target, done, {})
            way |= found
            done |= found.keys()
        return way

    def _best(self, target: fx.Node, done: set[fx.Node], memo: dict[fx.Node, Way]) -> Way:
        if target in done:
            return {}
        if target not in memo:
            kept: Way = {target: None}
            for source in self.graph.predecessors(target):
                kept = self._best(source, done, memo) | kept
            best, least = kept, self._price(kept)
            for source in self._sources(target):
                edge = self.collapse(source, target)
                if edge is None:
                    continue
                found = {**self._best(source, done, memo), target: edge}
                if (price := self._price(found)) < least:
                    best, least = found, price
            memo[target] = best
        return memo[target]

    def _price(self, way: Way) -> tuple[float, int, int]:
        """Work; where that is equal, rather values that several ops read, and few of them."""
        work = sum((node_cost(node) if choice is None else choice.plan.cost for node, choice in way.items()), Cost()).work
        return work, -sum(len(node.users) > 1 for node in way), len(way)

    def _sources(self, target: fx.Node) -> list[fx.Node]:
        """The values that alone determine the target, the earliest first."""
        return sorted((node for node in self._before(target) if target in self.follow(node)), key=self.order.__getitem__)

    def misses(self, way: Mapping[fx.Node, Choice]) -> list[tuple[str, fx.Node]]:
        """(reason, node) for what could not go: the refused collapses between values that are computed, without those inside a larger one."""
        starts = {node for node in self.graph if not self.graph.in_degree(node)} | set(way)
        told = {key: reason for key, reason in self.refused.items() if key[0] in starts and self._ends(key, way)}
        inner = {key for key in told for other in told if key != other and self._inside(key, other)}
        return list(dict.fromkeys((reason, key[1]) for key, reason in told.items() if key not in inner))

    def _ends(self, key: tuple[fx.Node, fx.Node], way: Mapping[fx.Node, Choice]) -> bool:
        """Does a refused collapse end at something that runs, and not inside a larger one that was done?"""
        source, target = key
        holding = [one for one in way.values() if one is not None and target in one.dying]
        return target in way or any(one.source is not source and one.source not in self._before(source) for one in holding)

    def _inside(self, key: tuple[fx.Node, fx.Node], other: tuple[fx.Node, fx.Node]) -> bool:
        """Is one refused collapse a part of another that was refused for its cost too?"""
        if not self._for_cost(key) or not self._for_cost(other):
            return False
        begins = key[0] is other[0] or other[0] in self._before(key[0])
        return begins and (key[1] is other[1] or key[1] in self._before(other[1]))

    def _for_cost(self, key: tuple[fx.Node, fx.Node]) -> bool:
        return key[1] in self.follow(key[0])


def components(space: Space) -> list[Component]:
    """The maximal regions of affine ops, with at least two of them, in the order of execution."""
    from networkx import DiGraph, weakly_connected_components

    graph: nx.DiGraph[fx.Node] = DiGraph()
    order = {node: i for i, node in enumerate(space.region.graph.nodes)}
    for node in order:
        for source in inputs(space, node) or ():
            graph.add_edge(source, node)
    found = [Component(space, graph.subgraph(nodes), order) for nodes in weakly_connected_components(graph)]
    return sorted((one for one in found if len(one.ops) > 1), key=lambda one: order[one.ops[0]])


def _users(node: fx.Node) -> list[fx.Node]:
    """The ops that read a value; the parts of a split stand for the split."""
    return [part for user in node.users for part in (list(user.users) if not isinstance(user.meta.get("val"), Tensor) and user.users else [user])]

