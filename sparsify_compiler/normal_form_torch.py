"""torch functions, Tensor methods and Python operators, as fx.symbolic_trace records them in a pattern → aten overloads."""

from __future__ import annotations

import builtins
import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .normal_form_edit import Overload, aten, is_call

_OPERATORS: dict[Any, str] = {
    operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.truediv: "div", operator.floordiv: "floor_divide", operator.neg: "neg",
    operator.pow: "pow", operator.matmul: "matmul", operator.eq: "eq", operator.ne: "ne", operator.lt: "lt", operator.le: "le", operator.gt: "gt",
    operator.ge: "ge", operator.and_: "__and__", operator.or_: "__or__", operator.invert: "bitwise_not", operator.abs: "abs",
}
_REFLECTED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "add": "add", "mul": "mul", "eq": "eq", "ne": "ne"}
_CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16, "long": torch.int64, "int": torch.int32,
          "bool": torch.bool}
_VARIADIC = {"view": "size", "reshape": "shape", "permute": "dims", "expand": "size", "repeat": "repeats", "flip": "dims"}
_MEANINGLESS = frozenset({"inplace", "_stacklevel", "training"})
_BY_SCALAR = frozenset({"add", "sub", "mul", "div"})  # export gives the Tensor overload a plain number here


def to_aten(node: fx.Node) -> bool:
    """Rewrite one call in place. True when it changed; a call that aten has no operator for stays as it is."""
    if node.op == "call_method":
        return _method(node)
    if node.op != "call_function" or isinstance(node.target, Overload):
        return False
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return _resolve(node, node.target._qualified_op_name.rpartition("::")[2], node.args, dict(node.kwargs))
    if node.target is builtins.getattr:
        return _attribute(node)
    if node.target is operator.getitem:
        return _index(node)
    if node.target in _OPERATORS:
        return _operator(node, _OPERATORS[node.target])
    name = getattr(node.target, "__name__", "")
    if inspect.isfunction(node.target):
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        named = {k: v for k, v in bound.arguments.items() if k not in _MEANINGLESS}
        return _function(node, name, named)
    return _resolve(node, name, node.args, dict(node.kwargs))


def _function(node: fx.Node, name: str, named: dict[str, Any]) -> bool:
    """A function that torch.nn.functional writes in Python."""
    if name == "dropout":
        return _resolve(node, name, (), {"input": named["input"], "p": named.get("p", 0.5), "train": False})
    if name == "relu6":
        return _resolve(node, "hardtanh", (named["input"],), {"min_val": 0.0, "max_val": 6.0})
    if name == "embedding":
        return _resolve(node, name, (named["weight"], named["input"]), {})
    if name == "batch_norm":
        rest = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5, "cudnn_enabled": True}
        return _resolve(node, name, (), rest | named)
    return _resolve(node, name, (), named)


def _method(node: fx.Node) -> bool:
    name, (self, *rest) = str(node.target), node.args
    if name in _CASTS and not rest:
        return _resolve(node, "to", (self, _CASTS[name]), {})
    if name == "size" and len(rest) == 1:
        return _become(node, aten.sym_size.int, {"self": self, "dim": rest[0]})
    if name in _VARIADIC and rest and not isinstance(rest[0], (list, tuple)):
        return _resolve(node, name, (self, list(rest)), dict(node.kwargs))
    return _resolve(node, name, node.args, dict(node.kwargs))


def _operator(node: fx.Node, name: str) -> bool:
    if _is_size(node):
        return False
    a = node.args
    if len(a) == 2 and not isinstance(a[0], fx.Node):  # 1 - x, 2 / x
        if name == "sub":
            return _become(node, aten.rsub.Scalar, {"self": a[1], "other": a[0]})
        if name == "div":
            return _reciprocal(node, a[0], a[1])
        if name not in _REFLECTED:
            return _resolve(node, name, a, {})
        return _resolve(node, _REFLECTED[name], (a[1], a[0]), {})
    return _resolve(node, name, a, {})


def _reciprocal(node: fx.Node, number: Any, x: Any) -> bool:
    with node.graph.inserting_before(node):
        inverse = node.graph.call_function(aten.reciprocal.default, (), {"self": x})
    if number == 1:
        node.replace_all_uses_with(inverse)
        node.graph.erase_node(node)
        return True
    return _become(node, aten.mul.Tensor, {"self": inverse, "other": number})


def _attribute(node: fx.Node) -> bool:
    """x.T and x.mT; x.shape stays until it is indexed."""
    x, name = node.args[:2]
    if name == "T":
        return _become(node, aten.numpy_T.default, {"self": x})
    if name == "mT":
        return _become(node, aten.transpose.int, {"self": x, "dim0": -2, "dim1": -1})
    return False


def _index(node: fx.Node) -> bool:
    """x.shape[i] → sym_size; x[i], x[:, None] and slices → select, unsqueeze, slice. A part of a tuple stays getitem."""
    x, index = node.args
    current: Any
    if isinstance(x, fx.Node) and x.target is builtins.getattr and x.args[1] == "shape" and isinstance(index, int):
        return _become(node, aten.sym_size.int, {"self": x.args[0], "dim": index})
    several = is_call(x, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.topk.default)
    parts: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    if several or (isinstance(index, int) and isinstance(x, fx.Node) and _gives_several(x)) or any(not _plain_index(p) for p in parts):
        return False
    dim, current = 0, x
    with node.graph.inserting_before(node):
        for part in parts:
            if part is None:
                current = node.graph.call_function(aten.unsqueeze.default, (), {"self": current, "dim": dim})
            elif isinstance(part, int):
                current = node.graph.call_function(aten.select.int, (), {"self": current, "dim": dim, "index": part})
                dim -= 1
            elif part != slice(None):
                ends = {"start": part.start, "end": part.stop, "step": part.step or 1}
                current = node.graph.call_function(aten.slice.Tensor, (), {"self": current, "dim": dim, **ends})
            dim += 1
    node.replace_all_uses_with(current)
    node.graph.erase_node(node)
    return True


def _plain_index(part: Any) -> bool:
    return part is None or (isinstance(part, (int, slice)) and not isinstance(part, bool))


def _gives_several(node: fx.Node) -> bool:
    return isinstance(node.target, Overload) and (len(node.target._schema.returns) > 1 or "List" in str(node.target._schema.returns[0].type))


def _is_size(node: fx.Node) -> bool:
    """Arithmetic of sizes stays Python's own."""
    return any(is_call(n, aten.sym_size.int) or (isinstance(n.meta.get("val"), torch.SymInt)) for n in node.all_input_nodes)


def _become(node: fx.Node, target: Overload, kwargs: dict[str, Any]) -> bool:
    node.op, node.target, node.args, node.kwargs = "call_function", target, (), kwargs
    return True


def _resolve(node: fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Call the overload of aten.<name> that fits the arguments best."""
    packet = getattr(aten, name, None)
    if packet is None:
        return False
    best: tuple[float, int] | None = None
    chosen: tuple[Overload, dict[str, Any]] | None = None
    for place, overload_name in enumerate(packet.overloads()):
        overload = getattr(packet, overload_name)
        named = _bind(overload, args, kwargs)
        if named is None:
            continue
        cost = sum(_misfit(known, named[known.name]) for known in overload._schema.arguments if known.name in named)
        cost -= 0.5 if name in _BY_SCALAR and overload_name == "Tensor" else 0
        if cost < math.inf and (best is None or (cost, place) < best):
            best, chosen = (cost, place), (overload, named)
    return chosen is not None and _become(node, *chosen)


def _bind(overload: Overload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments by the schema's names; torch says `input` where aten says `self`. None when they do not fit."""
    schema = overload._schema
    if overload._overloadname == "out" or any(a.is_out for a in schema.arguments):
        return None
    names = [a.name for a in schema.arguments]
    positional = [a.name for a in schema.arguments if not a.kwarg_only]
    if len(args) > len(positional):
        return None
    other: Callable[[str], str] = lambda k: k if k in names else {"input": "self", "self": "input", "tensor": "self"}.get(k, k)  # noqa: E731
    named = dict(zip(positional, args, strict=False)) | {other(k): v for k, v in kwargs.items()}
    required = {a.name for a in schema.arguments if not a.has_default_value()}
    return named if set(named) <= set(names) and required <= set(named) else None


def _misfit(known: Any, value: Any) -> float:
    """0 where a value is of the schema's kind, 1 where it may be, infinity where it is not."""
    kind = str(known.type)
    if isinstance(value, fx.Node):
        return 0 if "Tensor" in kind else 1
    if value is None:
        return 0 if kind.startswith("Optional") or "NoneType" in kind else math.inf
    if isinstance(value, (list, tuple)):
        return 0 if "List" in kind else math.inf
    if isinstance(value, (bool, torch.dtype, str)):
        wanted = {bool: "bool", str: "str"}.get(type(value), "int")
        return 0 if wanted in kind else math.inf if isinstance(value, (str, torch.dtype)) or "Tensor" in kind else 2
    if "List" in kind:
        return 0.5 if isinstance(value, int) and "int" in kind else math.inf
    if "number" in kind or (isinstance(value, int) and "int" in kind) or "float" in kind:
        return 0
    return 1 if kind == "Tensor" else math.inf
