"""Patterns: a function of tensors, traced once and brought to normal form by the code that captured graphs go through.

A pattern calls torch.nn.functional, torch.* and operators on its arguments. An argument stands for any node, parameter or constant (a stride,
an eps, a missing bias: None); used twice, it must be the same value twice. What the pattern does not write must have its default in the graph.
It is matched from its output down, and the nearest miss is kept.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

from .errors import SparsifyError
from .normal_form import normalise

COMMUTATIVE = frozenset({"add", "mul", "maximum", "minimum", "logical_and", "logical_or"})
# Arguments without effect on the value in eval mode, which a pattern never needs to write.
WITHOUT_EFFECT: Mapping[str, frozenset[str]] = {"batch_norm": frozenset({"momentum", "cudnn_enabled"})}


@dataclass(frozen=True)
class Variable:
    """An argument of the pattern."""

    name: str


@dataclass(frozen=True, eq=False)
class Call:
    """An op of the pattern, in normal form: `named` by the schema's names; only Python's getitem has positional arguments."""

    op: str
    positional: tuple[Any, ...]
    named: Mapping[str, Any]


@dataclass(frozen=True)
class Pattern:
    """A traced pattern: its variables in order, its calls in order of execution; the last call is the output."""

    variables: tuple[str, ...]
    calls: tuple[Call, ...]

    @property
    def output(self) -> Call:
        return self.calls[-1]


@dataclass(frozen=True)
class Near:
    """How near a pattern came at one place: calls matched, where it stopped, what was wanted there (several patterns differ in it) and found."""

    depth: int
    at: str
    wanted: tuple[str, ...]
    found: str

    def join(self, other: Near) -> Near:
        """The deeper of the two; one that wanted either where both stopped at the same place."""
        if (self.depth, self.at, self.found) == (other.depth, other.at, other.found):
            return Near(self.depth, self.at, tuple(dict.fromkeys(self.wanted + other.wanted)), self.found)
        return other if other.depth > self.depth else self

    def __str__(self) -> str:
        *first, last = self.wanted
        return f"expected {', '.join(first) + ' or ' if first else ''}{last}, found {self.found}"


@dataclass
class Search:
    """Collects the nearest miss of one search."""

    near: Near | None = None

    def miss(self, depth: int, at: str, wanted: str, found: str) -> None:
        new = Near(depth, at, (wanted,), found)
        self.near = new if self.near is None else self.near.join(new)


@dataclass(frozen=True)
class Binding:
    """What variables and calls stand for, while a match grows. Never changed in place, so that another order can be tried."""

    variables: Mapping[str, Any] = field(default_factory=dict)
    calls: Mapping[Call, fx.Node] = field(default_factory=dict)


Goal = tuple[Any, Any, str, fx.Node]  # pattern value, graph value, argument's name, the node that holds it


def trace(function: Callable[..., Any], params: Iterable[str] = ()) -> Pattern:
    """The pattern that a function of tensors writes down, in normal form; `params` names arguments that are parameters.

    Raises SparsifyError where it uses what is no op, or returns no call.
    """
    graph, root = fx.Graph(), nn.Module()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    names = tuple(inspect.signature(function).parameters)
    for name in params:
        root.register_parameter(name, nn.Parameter(torch.empty(0, dtype=torch.float32)))
    made = [graph.get_attr(name) if name in root._parameters else graph.placeholder(name) for name in names]
    result = function(*(fx.Proxy(node, tracer) for node in made))
    if not isinstance(result, fx.Proxy) or result.node in made:
        raise SparsifyError("a pattern returns the value of one op", where=function.__qualname__)
    graph.output(result.node)
    normalise(fx.GraphModule(root, graph))
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        values[node] = Variable(str(node.target)) if node.op in ("placeholder", "get_attr") else _call(node, values, function.__qualname__)
    calls = tuple(call for call in values.values() if isinstance(call, Call))
    if not calls:
        raise SparsifyError("a pattern returns the value of one op", where=function.__qualname__)
    return Pattern(names, calls)


def find(pattern: Pattern, node: fx.Node, search: Search) -> Iterator[Binding]:
    """Every way in which the pattern's output can be this node, in a fixed order."""
    return _solve(((pattern.output, node, "", node),), Binding(), search)


def op_name(node: fx.Node) -> str:
    """The op's name without namespace and overload: "conv2d" for aten.conv2d.default; other namespaces keep theirs."""
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.removeprefix("aten::").replace("::", ".")
    return getattr(node.target, "__name__", str(node.target)) if node.op == "call_function" else node.op


def same(one: Any, other: Any) -> bool:
    """True for the same node, two reads of one parameter, or equal constants of one type."""
    if isinstance(one, fx.Node) and isinstance(other, fx.Node):
        return one is other or (one.op == other.op == "get_attr" and one.target == other.target)
    if isinstance(one, fx.Node) or isinstance(other, fx.Node) or isinstance(one, bool) != isinstance(other, bool):
        return False
    return bool(one == other)


def _solve(goals: tuple[Goal, ...], binding: Binding, search: Search) -> Iterator[Binding]:
    if not goals:
        yield binding
        return
    (wanted, found, label, holder), rest = goals[0], goals[1:]
    if isinstance(wanted, Call):
        yield from _solve_call(wanted, found, holder, rest, binding, search)
    elif isinstance(wanted, Variable):
        bound = binding.variables
        if wanted.name in bound and not same(bound[wanted.name], found):
            search.miss(len(binding.calls), holder.name, f"the same {wanted.name} ({_spell(bound[wanted.name])})", _spell(found))
            return
        yield from _solve(rest, Binding({**bound, wanted.name: found}, binding.calls), search)
    elif isinstance(wanted, tuple) and any(isinstance(item, Variable | Call | tuple) for item in wanted):
        if isinstance(found, tuple) and len(found) == len(wanted):
            yield from _solve((*((w, f, label, holder) for w, f in zip(wanted, found, strict=True)), *rest), binding, search)
        else:
            search.miss(len(binding.calls), holder.name, f"{label} of {len(wanted)} values", _spell(found))
    elif same(wanted, found):
        yield from _solve(rest, binding, search)
    else:
        search.miss(len(binding.calls), holder.name, f"{label}={_spell(wanted)}", _spell(found))


def _solve_call(call: Call, found: Any, holder: fx.Node, rest: tuple[Goal, ...], binding: Binding, search: Search) -> Iterator[Binding]:
    if call in binding.calls:
        if binding.calls[call] is found:
            yield from _solve(rest, binding, search)
        return
    if not isinstance(found, fx.Node) or op_name(found) != call.op:
        at = found if isinstance(found, fx.Node) else holder
        search.miss(len(binding.calls), at.name, call.op, op_name(found) if isinstance(found, fx.Node) else _spell(found))
        return
    arguments = _arguments(call, found, search, len(binding.calls) + 1)
    if arguments is None:
        return
    grown = Binding(binding.variables, {**binding.calls, call: found})
    yield from _solve((*_goals(arguments, found), *rest), grown, search)
    if call.op in COMMUTATIVE and {"self", "other"} <= arguments.keys():
        swapped = {**arguments, "self": arguments["other"], "other": arguments["self"]}
        yield from _solve((*_goals(swapped, found), *rest), grown, search)


def _arguments(call: Call, node: fx.Node, search: Search, depth: int) -> dict[str, Any] | None:
    """What the pattern writes, by the names of the node's own schema; None where the node has more, or other, arguments."""
    if not isinstance(node.target, OpOverload):
        return {str(i): value for i, value in enumerate(call.positional)} if len(call.positional) == len(node.args) else None
    schema = {a.name: a for a in node.target._schema.arguments}
    silent = WITHOUT_EFFECT.get(call.op, frozenset())
    written = {name: value for name, value in call.named.items() if name not in silent}
    if not written.keys() <= schema.keys():
        search.miss(depth, node.name, f"another form of {call.op}", str(node.target))
        return None
    for name in node.kwargs:
        if name in written or name in silent:
            continue
        argument = schema[name]
        if not argument.has_default_value() or not same(_plain(node.kwargs[name], argument), _plain(argument.default_value, argument)):
            search.miss(depth, node.name, f"the default {name}", _spell(node.kwargs[name]))
            return None
    return {name: _plain(value, schema[name]) for name, value in written.items()}


def _goals(arguments: Mapping[str, Any], node: fx.Node) -> list[Goal]:
    if not isinstance(node.target, OpOverload):
        return [(wanted, _plain(node.args[int(i)], None), i, node) for i, wanted in arguments.items()]
    goals: list[Goal] = []
    for argument in node.target._schema.arguments:
        if argument.name in arguments:
            found = node.kwargs.get(argument.name, argument.default_value if argument.has_default_value() else None)
            goals.append((arguments[argument.name], _plain(found, argument), argument.name, node))
    return goals


def _plain(value: Any, argument: Any) -> Any:
    """One spelling for lists: a tuple, and for an argument such as int[2] one of the right length, whether written 1, [1] or [1, 1]."""
    length = getattr(argument, "N", None)
    if isinstance(value, list | tuple):
        items = tuple(_plain(item, None) for item in value)
        return items * length if length and len(items) == 1 else items
    return (value,) * length if length and isinstance(value, int) and not isinstance(value, bool) else value


def _call(node: fx.Node, made: Mapping[fx.Node, Any], where: str) -> Any:
    def known(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return made[value]
        return tuple(known(item) for item in value) if isinstance(value, list | tuple) else value

    if node.op == "output":
        return None
    if not isinstance(node.target, OpOverload) and node.target is not operator.getitem:
        raise SparsifyError(f"{getattr(node.target, '__name__', node.target)!r} is not an op of aten", where=f"pattern {where}")
    return Call(op_name(node), tuple(known(a) for a in node.args), {k: known(v) for k, v in node.kwargs.items()})


def _spell(value: Any) -> str:
    return value.name if isinstance(value, fx.Node) else repr(value)
