"""Shapes with symbols in them, as text and back: a loaded graph knows its shapes as well as a captured one does."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from .artefact_values import decode, encode
from .errors import ArtefactError


def symbols(graph: fx.Graph) -> dict[str, int]:
    """Every symbol in the shapes of a graph, and the size that it had in the example inputs."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        for size in _sizes(node.meta.get("val")):
            if isinstance(size, torch.SymInt):
                for symbol in size.node.expr.free_symbols:
                    hint = size.node.shape_env.backed_var_to_val.get(symbol)
                    found.setdefault(str(symbol), 2 if hint is None else int(hint))
    return dict(sorted(found.items()))


def encode_fake(value: Any) -> Any:
    """A node's fake value as JSON: {"tensor": [shape, dtype]}, {"size": formula} or a list of these; null for anything else."""
    if isinstance(value, Tensor):
        return {"tensor": [[_size_text(size) for size in value.shape], encode(value.dtype)]}
    if isinstance(value, (int, torch.SymInt)):
        return {"size": _size_text(value)}
    return [encode_fake(item) for item in value] if isinstance(value, (list, tuple)) else None


def _size_text(size: Any) -> int | str:
    """A number, or for a size that is a symbol or made of some its formula."""
    return size if type(size) is int else str(size)


def _sizes(value: Any) -> tuple[Any, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(size for item in value for size in _sizes(item))
    return tuple(value.shape) if isinstance(value, Tensor) else (value,)


class ShapeReader:
    """Makes tensors without data from shapes as JSON, all in one fake mode, as capture does."""

    def __init__(self, hints: Mapping[str, int]) -> None:
        self._hints = hints
        self._symbols: dict[str, Any] = {}
        self._env: Any = None
        self._mode: Any = None

    def decode(self, data: Any) -> Any:
        """What encode_fake wrote. Raises ArtefactError for a size that is no formula."""
        if isinstance(data, list):
            return [self.decode(item) for item in data]
        if not isinstance(data, dict):
            return None
        if "tensor" in data:
            return self._empty(data["tensor"][0], decode(data["tensor"][1]))
        self._start()
        return data["size"] if isinstance(data["size"], int) else self._size(data["size"])

    def _empty(self, shape: list[int | str], dtype: torch.dtype) -> Tensor:
        self._start()
        with self._mode, self._env.suppress_guards() if self._env is not None else nullcontext():
            return torch.empty([size if isinstance(size, int) else self._size(size) for size in shape], dtype=dtype)

    def _start(self) -> None:
        if self._mode is not None:
            return
        from torch._subclasses.fake_tensor import FakeTensorMode

        if self._hints:
            from torch.fx.experimental.symbolic_shapes import ShapeEnv

            self._env = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._env)

    def _size(self, text: str) -> Any:
        expression = self._parse(ast.parse(text, mode="eval").body)
        hint = expression.subs({symbol: self._hints[name] for name, symbol in self._symbols.items()})
        return self._env.create_symintnode(expression, hint=int(hint))

    def _parse(self, node: ast.expr) -> Any:
        """A formula of symbols, whole numbers and the few functions that sizes are made of; text from a file is never evaluated."""
        import sympy

        if isinstance(node, ast.Constant) and type(node.value) is int:
            return sympy.Integer(node.value)
        if isinstance(node, ast.Name) and node.id in self._hints:
            return self._symbol(node.id)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self._parse(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _operations():
            return _operations()[type(node.op)](self._parse(node.left), self._parse(node.right))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _functions():
            return _functions()[node.func.id](*(self._parse(argument) for argument in node.args))
        raise ArtefactError(f"not a size: {ast.unparse(node)!r}", where="graph.json", hint="save the model again")

    def _symbol(self, name: str) -> Any:
        if name not in self._symbols:
            import sympy
            from torch.fx.experimental.symbolic_shapes import ValueRangesSLoc
            from torch.utils._sympy.value_ranges import ValueRanges

            symbol = self._symbols[name] = sympy.Symbol(name, integer=True, positive=True)
            self._env.backed_var_to_val[symbol] = sympy.Integer(self._hints[name])
            self._env.var_to_range[symbol] = ValueRanges(2, 1 << 40)
            here = self._env._get_sloc("loaded from an artefact")
            self._env.var_to_range_sloc[symbol] = ValueRangesSLoc(here, here)
            self._env.var_to_sources[symbol] = []
        return self._symbols[name]


def _operations() -> dict[type, Callable[..., Any]]:
    from torch.utils._sympy.functions import FloorDiv

    return {
        ast.Add: lambda a, b: a + b,
        ast.Sub: lambda a, b: a - b,
        ast.Mult: lambda a, b: a * b,
        ast.Pow: lambda a, b: a**b,
        ast.FloorDiv: FloorDiv,
    }


def _functions() -> dict[str, Callable[..., Any]]:
    from torch.utils._sympy import functions

    return {name: getattr(functions, name) for name in ("FloorDiv", "CeilDiv", "Mod", "PythonMod", "Max", "Min") if hasattr(functions, name)}
