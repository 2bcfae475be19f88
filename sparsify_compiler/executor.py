"""A graph as one flat Python function: operators and kernels are its globals, so a call costs what its operators cost.

A GraphModule walks `self.encoder.layer.0...` for every tensor at every call and dispatches every op through torch.ops by name; on a small
model that is a tenth of the time.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .direct import DIRECT
from .epilogue import META, epilogue_of
from .far import runs_here
from .operands import inputs_of, is_stored
from .program import Region, get_tensor

LAZY = (torch.ops.aten.imag.default, torch.ops.aten._neg_view.default)      # may give numbers of another sign than what is in memory
_LITERALS = (int, bool, str, type(None))


def flat_function(region: Region) -> Callable[..., Any]:
    """forward(*flat inputs) of the region's graph, with node.meta["kernel"] called where a node has one, and its epilogue left to it.

    The tensors of the region are bound now: build it again after replacing one.
    """
    return _function(_Writer(region))


def live_function(region: Region) -> Callable[..., Any]:
    """forward(module, *flat inputs) of the region's graph, without kernels; its tensors are read, at each call, where they stand in the module.

    So the module trains, loads and is copied like any other. Raises KeyError where a tensor is no plain parameter or buffer there any more.
    """
    return _function(_LiveWriter(region))


def traced_function(region: Region) -> Callable[..., Any]:
    """The same for who traces it: operators by their registered names, and of the module nothing is looked at but the tensors that are read."""
    return _function(_LiveWriter(region, {}))


def part_function(region: Region, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Callable[..., Any]:
    """forward(*values of inputs) -> the values of outputs, which nothing but the inputs and the region's tensors leads to.

    Raises KeyError where something else does.
    """
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in inputs:
        made[node] = graph.placeholder(node.name)
    waiting, needed = list(outputs), set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node not in needed and node not in made:
            needed.add(node)
            waiting += node.all_input_nodes
    for node in region.graph.nodes:
        if node in needed:
            if node.op == "placeholder":
                raise KeyError(node.name)
            made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in outputs))
    return flat_function(Region(region.path, fx.GraphModule(region.module, graph), region.spec))


def defined(name: str, source: str, title: str, scope: dict[str, Any]) -> Callable[..., Any]:
    """The function `name` of Python source that was just written. Its lines are shown in tracebacks and profiles, under a title."""
    linecache.cache[title] = (len(source), None, source.splitlines(keepends=True), title)
    exec(compile(source, title, "exec"), scope)
    function: Callable[..., Any] = scope[name]
    return function


def _function(writer: _Writer) -> Callable[..., Any]:
    region = writer.region
    lines = [line for node in region.graph.nodes for line in writer.statement(node)]
    source = f"def forward({', '.join(writer.inputs)}):\n" + "".join(f"    {line}\n" for line in (*writer.opening, *lines))
    function = defined("forward", source, f"<sparsify {region.path or 'model'} {id(writer):x}>", writer.globals)
    function.__dict__["source"] = source
    return function


class _Writer:
    """Turns nodes into statements and collects what they refer to."""

    def __init__(self, region: Region, direct: Mapping[Any, Callable[..., Any]] = DIRECT) -> None:
        self.region, self.module, self._direct = region, region.module, direct
        self.globals: dict[str, Any] = {}
        self.inputs: list[str] = []
        self.opening: list[str] = []  # statements before all others
        self._names: dict[fx.Node, str] = {}
        self._constants: dict[int, str] = {}
        self._kernels, self._skipped = kernel_calls(region.graph)
        self._dying = _last_uses([(node, self._read(node)) for node in region.graph.nodes if node not in self._skipped])

    def statement(self, node: fx.Node) -> list[str]:
        if node in self._skipped:
            return []
        name = self._names[node] = f"v{len(self._names)}"
        if node.op == "placeholder":
            self.inputs.append(name)
            return []
        if node.op == "get_attr":
            self._tensor(node, name)
            return []
        if node.op == "output":
            return [*self._copies(node), f"return {self._value(node.args[0])}"]
        dying = [self._names[n] for n in self._dying.get(node, ()) if n.op not in ("get_attr", "output")]
        freed = f"; {' = '.join(dying)} = None" if dying else ""
        return [f"{name} = {self._call(node)}{freed}"]

    def _copies(self, output: fx.Node) -> list[str]:
        """Results that lie in the model itself: callers may write into what they get, where the model computed it at each call."""
        lines = []
        for number, node in enumerate(node for node in output.all_input_nodes if lies_in_model(node)):
            lines.append(f"r{number} = {self._names[node]}.clone()")
            self._names[node] = f"r{number}"
        return lines

    def _tensor(self, node: fx.Node, name: str) -> None:
        self.globals[name] = get_tensor(self.module, str(node.target))

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose values a statement needs."""
        return list(self._kernels[node][1]) if node in self._kernels else node.all_input_nodes

    def _call(self, node: fx.Node) -> str:
        if node in self._kernels:
            kernel, inputs = self._kernels[node]
            return f"{self._constant(kernel)}({', '.join(self._value(value) for value in inputs)})"
        positional, named = list(node.args), dict(node.kwargs)
        if isinstance(node.target, torch._ops.OpOverload) and not positional:
            # The dispatcher takes positional arguments a microsecond faster than named ones.
            for argument in node.target._schema.arguments:
                if argument.kwarg_only or argument.name not in named:
                    break
                positional.append(named.pop(argument.name))
        parts = [self._value(value) for value in positional] + [f"{key}={self._value(value)}" for key, value in named.items()]
        lazy = ".resolve_neg()" if node.target in LAZY else ""      # kernels read what is in memory
        return f"{self._constant(self._direct.get(node.target, node.target))}({', '.join(parts)}){lazy}"

    def _value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._names[value]
        if isinstance(value, list):
            return f"[{', '.join(self._value(item) for item in value)}]"
        if isinstance(value, tuple) and type(value) is tuple:
            return f"({''.join(self._value(item) + ', ' for item in value)})"
        if type(value) in _LITERALS:
            return repr(value)
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        if id(value) not in self._constants:
            name = self._constants[id(value)] = f"c{len(self._constants)}"
            self.globals[name] = value
        return self._constants[id(value)]


class _LiveWriter(_Writer):
    """Reads every tensor out of the module that is the function's first argument: one lookup a tensor, and two a module that owns some."""

    def __init__(self, region: Region, direct: Mapping[Any, Callable[..., Any]] = DIRECT) -> None:
        super().__init__(region, direct)
        self.inputs.append("module")
        self._kernels, self._skipped = {}, set()
        self._dying = _last_uses([(node, node.all_input_nodes) for node in region.graph.nodes])
        self._owners: dict[str, str] = {"": "module"}
        self._tables: dict[str, str] = {}

    def _tensor(self, node: fx.Node, name: str) -> None:
        owner, _, leaf = str(node.target).rpartition(".")
        kind = "_parameters" if leaf in self.module.get_submodule(owner)._parameters else "_buffers"
        self._names[node] = f"{self._table(owner, kind)}[{leaf!r}]"

    def _table(self, owner: str, kind: str) -> str:
        place = f"{owner}.{kind}"
        if place not in self._tables:
            self._tables[place] = f"t{len(self._tables)}"
            self.opening.append(f"{self._tables[place]} = {self._owner(owner)}.{kind}")
        return self._tables[place]

    def _owner(self, path: str) -> str:
        if path not in self._owners:
            parent, _, name = path.rpartition(".")
            parent_name = self._owner(parent)
            self._owners[path] = f"m{len(self._owners)}"
            self.opening.append(f"{self._owners[path]} = {parent_name}._modules[{name!r}]")
        return self._owners[path]


def lies_in_model(node: fx.Node) -> bool:
    """Is a value a tensor of the model, or a view of one?"""
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.all_input_nodes:
        returned = node.target._schema.returns
        if not returned or returned[0].alias_info is None:
            return False
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def kernel_calls(graph: fx.Graph) -> tuple[dict[fx.Node, tuple[Any, tuple[fx.Node, ...]]], set[fx.Node]]:
    """Node -> the kernel to call there and on what; nodes that a kernel behind them computes.

    A kernel with an epilogue is called where the epilogue ends: what it adds may be computed after the node that the kernel belongs to.
    """
    calls: dict[fx.Node, tuple[Any, tuple[fx.Node, ...]]] = {}
    skipped: set[fx.Node] = set()
    for node in graph.nodes:
        if not runs_here(node):
            continue
        inputs = inputs_of(node)
        later = [node]
        if META in node.meta:
            epilogue = epilogue_of(node)
            later += epilogue.nodes
            inputs += () if epilogue.other is None else (epilogue.other,)
        calls[later[-1]] = node.meta["kernel"], inputs
        skipped.update(later[:-1])
    for node in reversed(graph.nodes):  # views of stored tensors that only kernels read
        if is_stored(node) and node.op != "get_attr" and all(user in skipped or runs_here(user) for user in node.users):
            skipped.add(node)
    return calls, skipped


def _last_uses(statements: list[tuple[fx.Node, list[fx.Node]]]) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the nodes whose values nobody needs after it, so that they can be freed. Takes each node with those that it reads."""
    seen: set[fx.Node] = set()
    dying: dict[fx.Node, list[fx.Node]] = {}
    for node, read in reversed(statements):
        for used in read:
            if used not in seen:
                seen.add(used)
                dying.setdefault(node, []).append(used)
        if node not in seen and node.op == "call_function":
            dying.setdefault(node, []).append(node)  # nobody reads it
        seen.add(node)
    return dying
