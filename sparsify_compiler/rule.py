"""A rule: pattern, check, rewrite — three plain functions. The engine matches, asks, traces the formula, splices it in and folds.

    class MergeScale(Rule):
        params = ("w", "s")                                      # must depend on parameters alone

        @staticmethod
        def pattern(x, w, s): return linear(x, w) * s
        def check(self, m):   return None if m.s.ndim == 1 else Miss(f"needs a vector, got {tuple(m.s.shape)}")
        @staticmethod
        def rewrite(x, w, s): return linear(x, w * s[:, None])   # runs on fake tensors: shapes, None and Python's `if` work
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

from torch import fx

from .errors import SparsifyError
from .fold import constants, is_constant
from .passes_api import Context, Miss, Pass
from .pattern import Binding, Near, Pattern, Search, find, op_name, trace
from .program import Program, Region, get_tensor
from .splice import rewrite


class Rule:
    """Base of all rules. A subclass defines `pattern` and `rewrite` (static, or methods of an object with options) and may define `check`.

    pattern(...)   an op of torch.nn.functional, torch.* and operators on its arguments; arguments stand for values or attributes
    check(match)   None to accept, or a Miss that says why not
    rewrite(...)   the same value in another way; takes those of the pattern's arguments that it needs, by name
    params         arguments that must depend on parameters alone; constants such as None and numbers are fine
    only_if_cheaper  refuse where what the rewrite computes at run time has more FLOPs or bytes than what it replaces
    folds          False leaves the new parameter arithmetic in the graph, so that gradients reach the parameters themselves
    """

    params: ClassVar[tuple[str, ...]] = ()
    only_if_cheaper: ClassVar[bool] = False
    folds: ClassVar[bool] = True
    pattern: Callable[..., Any]
    rewrite: Callable[..., Any]

    def patterns(self) -> tuple[Callable[..., Any], ...]:
        """Several ways to write the same thing; each uses a part of rewrite's arguments, the others are None."""
        return (self.pattern,)

    def check(self, m: Match) -> Miss | None:
        """None to accept the match, or a Miss that says why not."""
        return None


@dataclass(frozen=True)
class Match:
    """Where a pattern fits. `m.w` is what the argument `w` stands for: the tensor itself for a parameter, otherwise its fake value (shape,
    dtype), or a constant. `m.node("w")` is the node.
    """

    region: Region
    pattern: Pattern
    binding: Binding

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self.binding.variables:
            raise AttributeError(f"the pattern has no argument {name!r}")
        bound = self.binding.variables[name]
        if not isinstance(bound, fx.Node):
            return bound
        return get_tensor(self.region.module, str(bound.target)).detach() if bound.op == "get_attr" else bound.meta["val"]

    def node(self, name: str) -> fx.Node | None:
        """The node that an argument stands for; None for a constant."""
        bound = self.binding.variables[name]
        return bound if isinstance(bound, fx.Node) else None

    @property
    def output(self) -> fx.Node:
        """The matched node whose value is rewritten."""
        return self.binding.calls[self.pattern.output]

    @property
    def nodes(self) -> list[fx.Node]:
        """The matched nodes, in the order in which the pattern computes them."""
        return [self.binding.calls[call] for call in self.pattern.calls]

    def source(self, op: str) -> fx.Node:
        """The matched node whose place in the model a new node of this op takes: the first of the same op, else the output."""
        return next((node for node in self.nodes if op_name(node) == op), self.output)


@dataclass
class Tried:
    """What the rules of a pass met in one region, as it is now: how often they acted, and why they did not act on what is left."""

    about: frozenset[str] = frozenset()
    fired: int = 0
    refused: dict[str, list[Miss]] = field(default_factory=dict)  # node that the pattern would end at -> reasons
    near: dict[str, Near] = field(default_factory=dict)  # the same, where the structure was another
    told: set[str] = field(default_factory=set)  # nodes of refused matches: their structure was right
    lacks: list[frozenset[str]] = field(default_factory=list)  # for each pattern, its ops that the graph does not have

    def forget(self) -> None:
        """The graph has changed: what was refused before may be gone."""
        self.refused, self.near, self.told, self.lacks = {}, {}, set(), []

    def note(self, root: fx.Node, near: Near | None) -> None:
        """Keep the nearest structural miss of a node; rules that fail at the same place are told together."""
        old = self.near.get(root.name)
        if near is not None and near.depth > (0 if not self.about or op_name(root) in self.about else 1):
            self.near[root.name] = near if old is None else old.join(near)

    def misses(self) -> list[Miss]:
        """Refused matches, then the nearest structural misses; where there is neither and no rule acted, what the graph lacks."""
        found = [miss for reasons in self.refused.values() for miss in reasons]
        nears = [near for root, near in self.near.items() if root not in self.told]
        deepest = max((near.depth for near in nears), default=0)
        found += [Miss(str(near), near.at) for near in nears if near.depth == deepest]
        if not found and not self.fired:
            common = frozenset.intersection(*self.lacks) if self.lacks else frozenset()
            found = [Miss(f"there is no {', '.join(sorted(common))} in the graph" if common else "nothing in the graph looks like its patterns")]
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class RulePass(Pass):
    """A pass made of rules: applied in the order of execution, first rule first, again until none fits any more.

    The passes of `reparam` are examples. A subclass gives `rules()`; its file is documented like every pass. `about` names the ops that the
    pass exists to remove: then a pattern that only began at another op is not told as a miss.
    """

    about: ClassVar[frozenset[str]] = frozenset()

    def rules(self) -> Sequence[Rule]:
        """The rules, the most specific first."""
        raise NotImplementedError

    def run(self, program: Program, ctx: Context) -> Program:
        rules = _traced(self)
        for region in program.regions.values():
            for miss in rewrite_region(region, rules, ctx, self.name(), self.about).misses():
                ctx.miss(miss.why, region.qualified(miss.at) if miss.at else region.path)
        return program


Traced = Sequence[tuple[Rule, Sequence[Pattern]]]


@lru_cache(maxsize=64)
def _traced(item: RulePass) -> Traced:
    """A pass's rules with their patterns, traced once for each value of its options."""
    return [(rule, [trace(pattern, rule.params) for pattern in rule.patterns()]) for rule in item.rules()]


def rewrite_region(region: Region, rules: Traced, ctx: Context, by: str, about: frozenset[str] = frozenset()) -> Tried:
    """Apply rules to a fixed point. Raises SparsifyError where they undo each other for ever."""
    tried, limit, before = Tried(about), 10 * len(region.graph.nodes) + 100, -1
    while tried.fired > before:
        before = tried.fired
        tried.forget()
        _scan(region, rules, tried, ctx, by)
        if tried.fired > limit:
            raise SparsifyError(f"the rules are still rewriting after {limit} rewrites: one undoes the other", where=region.path)
    return tried


def _scan(region: Region, rules: Traced, tried: Tried, ctx: Context, by: str) -> None:
    """Offer every node, in the order of execution, to every rule."""
    present = {op_name(node) for node in region.graph.nodes}
    possible: list[tuple[Rule, list[Pattern]]] = []
    for rule, patterns in rules:
        lacks = [frozenset(call.op for call in pattern.calls) - present for pattern in patterns]
        tried.lacks += lacks
        possible.append((rule, [p for p, lack in zip(patterns, lacks, strict=True) if not lack]))
    fixed = constants(region.graph)  # weight arithmetic, masks among it, is for folding and not for rules
    for node in [node for node in region.graph.nodes if node not in fixed]:
        for rule, patterns in possible:
            if node._erased or (ctx.fuel is not None and ctx.rewrites >= ctx.fuel):
                break
            _apply(rule, [p for p in patterns if p.output.op == op_name(node)], region, node, tried, ctx, by)


def _apply(rule: Rule, patterns: Sequence[Pattern], region: Region, node: fx.Node, tried: Tried, ctx: Context, by: str) -> None:
    search = Search()
    refused: list[Miss] = []
    for match in _matches(patterns, region, node, search):
        why = _others(match) or _params(rule, match) or rule.check(match) or rewrite(rule, match, ctx, by)
        if why is None:
            tried.fired += 1
            tried.refused.pop(node.name, None)
            tried.near.pop(node.name, None)
            return
        refused.append(Miss(why.why, why.at or node.name))
        tried.told.update(one.name for one in match.nodes)
    if refused:
        tried.refused.setdefault(node.name, []).extend(refused)
    tried.note(node, search.near)


def _matches(patterns: Sequence[Pattern], region: Region, node: fx.Node, search: Search) -> Iterator[Match]:
    for pattern in patterns:
        for binding in find(pattern, node, search):
            yield Match(region, pattern, binding)


def _others(match: Match) -> Miss | None:
    """Values inside the match must not be needed outside of it: they will no longer be computed."""
    inside = set(match.nodes)
    for node in match.nodes:
        outside = [user.name for user in node.users if user not in inside]
        if node is not match.output and outside and not is_constant(node):
            return Miss(f"the intermediate value {node.name} is also used by {', '.join(outside)}")
    return None


def _params(rule: Rule, match: Match) -> Miss | None:
    for name in rule.params:
        node = match.node(name) if name in match.binding.variables else None
        if node is not None and not is_constant(node):
            return Miss(f"{name} must be a parameter, it is {op_name(node)} ({node.name})")
    return None
