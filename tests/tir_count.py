"""Counts what a kernel does by walking its TensorIR with the sizes and integer tensors of a call: no number but an integer is computed.

    counts = count(schedule.compute(), [(shape of x, None), (shape of values, None), (shape of pointers, the pointers), ...])
    counts.lanes      multiply-adds, one for each lane of a vector
    counts.calls      of imported functions and instructions, by name
    counts.loaded     elements read, by number of the parameter; scratch by -1
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import tvm

Env = dict[Any, Any]
Argument = tuple[tuple[int, ...], torch.Tensor | None]
BINARY: Mapping[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b, "Sub": lambda a, b: a - b, "Mul": lambda a, b: a * b, "FloorDiv": lambda a, b: a // b, "FloorMod": lambda a, b: a % b,
    "Div": lambda a, b: int(a / b), "Mod": lambda a, b: a - b * int(a / b),
    "Min": min, "Max": max, "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b, "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b, "And": lambda a, b: a and b, "Or": lambda a, b: a or b,
}  # fmt: skip
PARTS = ("a", "b", "value", "args", "indices", "vectors", "base", "stride", "condition", "true_value", "false_value")


@dataclass
class Counts:
    """What was counted; `known` gives imported functions of integers their result."""

    known: Mapping[str, Callable[..., int]] = field(default_factory=dict)
    lanes: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    loaded: Counter[int] = field(default_factory=Counter)
    stored: Counter[int] = field(default_factory=Counter)


def count(function: Any, arguments: Sequence[Argument], known: Mapping[str, Callable[..., int]] | None = None) -> Counts:
    """Run the loops of a PrimFunc; arguments by parameter: the shape, and the tensor where loops depend on its integers."""
    walk = _Walk(Counts({"scalar": lambda x: x, **(known or {})}))
    for number, (parameter, (shape, tensor)) in enumerate(zip(function.params, arguments, strict=True)):
        walk.places[parameter] = number
        for size, value in zip(parameter.shape, shape, strict=True):
            if _kind(size) == "Var":
                walk.env[size] = value
        if tensor is not None:
            walk.cells[parameter] = dict(enumerate(tensor.flatten().tolist()))
    walk.run(function.body)
    return walk.counts


def _kind(node: Any) -> str:
    return type(node).__name__


def _lanes(node: Any) -> int:
    return int(str(node.ty).partition("x")[2] or 1)


def _name(node: Any) -> str:
    """Of what is called: an imported function, an instruction by LLVM's name, or an operator of TVM."""
    if node.op.name.startswith("tirx.call_llvm"):
        return str(tvm.get_global_func("target.llvm_get_intrinsic_name")(int(node.args[0].value))).removeprefix("llvm.")
    return str(node.args[0].value if node.op.name.startswith("tirx.call_") else node.op.name)


class _Walk:
    """One run. `cells` holds the integers of tensors and of places on the stack, by flat index."""

    def __init__(self, counts: Counts) -> None:
        self.counts, self.env, self.places, self.cells = counts, {}, {}, {}
        self.static: dict[Any, list[tuple[str, Any, int]]] = {}
        self.alike: dict[Any, bool] = {}

    def run(self, node: Any) -> None:
        getattr(self, f"_{_kind(node)}".lower(), self._plain)(node)

    def _plain(self, node: Any) -> None:
        if hasattr(node, "body"):
            self.run(node.body)

    def _seqstmt(self, node: Any) -> None:
        for one in node.seq:
            self.run(one)

    def _for(self, node: Any) -> None:
        start, extent = self.value(node.min), self.value(node.extent)
        if extent > 1 and self._alike(node.body):
            counts, self.counts = self.counts, Counts(self.counts.known)
            self.env[node.loop_var] = start
            self.run(node.body)
            self.counts, once = counts, self.counts
            counts.lanes += extent * once.lanes
            for many, one in ((counts.calls, once.calls), (counts.loaded, once.loaded), (counts.stored, once.stored)):
                many.update({key: extent * number for key, number in one.items()})  # type: ignore[attr-defined]
            return
        for i in range(start, start + extent):
            self.env[node.loop_var] = i
            self.run(node.body)

    def _alike(self, node: Any) -> bool:
        """Does a statement do the same whenever it runs? Then no branch is in it, no loop of another length, and no integer is kept."""
        if node not in self.alike:
            kind = _kind(node)
            inner = list(node.seq) if kind == "SeqStmt" else [node.body] if hasattr(node, "body") else []
            varies = kind == "IfThenElse" or (kind == "For" and _kind(node.extent) != "IntImm")
            varies = varies or (kind == "BufferStore" and str(node.value.ty) == "int32")
            self.alike[node] = not varies and all(self._alike(one) for one in inner)
        return self.alike[node]

    def _ifthenelse(self, node: Any) -> None:
        self._count(node.condition)
        if self.value(node.condition):
            self.run(node.then_case)
        elif node.else_case is not None:
            self.run(node.else_case)

    def _bind(self, node: Any) -> None:
        self._count(node.value)
        self.env[node.var] = self.guess(node.value)

    def _evaluate(self, node: Any) -> None:
        self._count(node.value)

    def _bufferstore(self, node: Any) -> None:
        self._count(node.value)
        self.counts.stored[self.places.get(node.buffer, -1)] += _lanes(node.value)
        if str(node.value.ty) == "int32":
            at = self.guess(node.indices[-1])
            if at is not None:
                self.cells.setdefault(node.buffer, {})[at] = self.guess(node.value)

    def _count(self, node: Any) -> None:
        """Everything in an expression, which is the same whenever it is computed."""
        if node not in self.static:
            self.static[node] = list(_events(node))
        for what, of, lanes in self.static[node]:
            if what == "load":
                self.counts.loaded[self.places.get(of, -1)] += lanes
            elif of == "fma":
                self.counts.lanes += lanes
            else:
                self.counts.calls[of] += 1

    def guess(self, node: Any) -> Any:
        """The value of an integer expression; None for all others, and where it depends on what was not computed."""
        try:
            return self.value(node)
        except (KeyError, TypeError, AttributeError, NotImplementedError):
            return None

    def value(self, node: Any) -> Any:
        kind = _kind(node)
        if kind == "IntImm":
            return int(node.value)
        if kind == "Var":
            return self.env[node]
        if kind in BINARY:
            return BINARY[kind](self.value(node.a), self.value(node.b))
        if kind == "Cast":
            return self.value(node.value)
        if kind == "Select":
            return self.value(node.true_value if self.value(node.condition) else node.false_value)
        if kind == "Not":
            return not self.value(node.a)
        if kind == "TensorLoad" and _lanes(node) == 1:
            return self.cells[node.buffer if hasattr(node, "buffer") else node.source][self.value(node.indices[-1])]
        if kind == "Call" and _name(node) in self.counts.known:
            return self.counts.known[_name(node)](*(self.guess(argument) for argument in node.args[1:]))
        raise NotImplementedError(kind)


def _events(node: Any) -> Any:
    """("load", buffer, lanes) and ("call", name, lanes) in an expression."""
    if isinstance(node, str | int | float) or node is None:
        return
    kind = _kind(node)
    if kind == "TensorLoad":
        yield "load", node.buffer if hasattr(node, "buffer") else node.source, _lanes(node)
    address = kind == "Call" and node.op.name == "tirx.address_of"
    if kind == "Call" and not address and node.op.name.startswith("tirx.call_"):
        yield "call", _name(node), _lanes(node)
    for part in PARTS if not address else ():
        inner = getattr(node, part, None)
        if inner is None or isinstance(inner, str | int | float):
            continue
        for one in inner if kind_is_list(inner) else (inner,):
            yield from _events(one)


def kind_is_list(value: Any) -> bool:
    """Is this one of TVM's arrays?"""
    return type(value).__name__ in ("Array", "list", "tuple")
