"""Options of passes as text and back: printing and parsing values, checking them against the types of a pass's fields.

The grammar is Python's own, read with `ast` and never evaluated: pass names called with options by name, joined by `|`.
"""

from __future__ import annotations

import ast
import keyword
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

from . import catalog
from .errors import ParseError, SparsifyError, nearest
from .option_types import fit
from .passes_api import Pass

# kinds whose classes may be written as an option's value
VALUES = ("structure", "budget", "score", "format", "attention pattern", "attention branch")
_WORDS: Mapping[str, Any] = {"None": None, "True": True, "False": False}


def print_value(value: Any) -> str:
    """An option's value as text that parse_value() reads back. Raises ParseError for what is not a plain value."""
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return _print_float(value)
    if isinstance(value, str):
        return str(value) if value.isidentifier() and value.isascii() and not keyword.iskeyword(value) else repr(str(value))
    if isinstance(value, tuple):
        return f"({', '.join(map(print_value, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(print_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{print_value(k)}: {print_value(v)}' for k, v in value.items())}}}"
    if is_dataclass(value) and not isinstance(value, type):
        options = ((f.name, getattr(value, f.name)) for f in fields(value) if f.init and getattr(value, f.name) != f.default)
        return f"{type(value).__name__}({', '.join(f'{k}={print_value(v)}' for k, v in options)})"
    raise ParseError(f"{value!r} is not a plain value",
                     hint="an option is a number, text, a tuple or list of these, or a dataclass such as NM(n=2, m=4)")


def parse_value(text: str) -> Any:
    """The value that this text names. Raises ParseError with its position."""
    return Reader(text).value(_expression(text))


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of "name" or "name(option=value)". Raises ParseError."""
    return Reader(text).call(_expression(text))[:2]


def parse_passes(text: str) -> tuple[Pass, ...]:
    """The passes that "a(x=1) | b()" names, a recipe standing for its passes. Raises ParseError, UnknownNameError."""
    if not text.strip():
        return ()
    reader = Reader(text)
    return tuple(p for node in _steps(_expression(text)) for p in reader.step(node))


def build_step(name: str, options: Mapping[str, Any], place: Callable[[str], str] = lambda option: "") -> tuple[Pass, ...]:
    """The pass of that name with these options, or the passes of the recipe of that name. `place` says where an option was written."""
    if name not in catalog.names("pass") and name in catalog.names("recipe"):
        steps = build_recipe(name, options)
        return steps if isinstance(steps, tuple) else tuple(steps.passes)
    found = build(catalog.get("pass", name), options, name, place)
    if not isinstance(found, Pass):
        raise ParseError(f"{name!r} is not a pass", where=name)
    return (found,)


def build_recipe(name: str, options: Mapping[str, Any]) -> Any:
    """What the recipe returns. Raises ParseError where it has no such option."""
    recipe = catalog.get("recipe", name)
    code = recipe.__code__
    known = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    for option in options:
        if option not in known:
            raise ParseError(f"the recipe {name!r} has no option {option!r}", where=name, hint=nearest(option, known))
    return recipe(**options)


def build(cls: type, options: Mapping[str, Any], label: str, place: Callable[[str], str] = lambda option: "") -> Any:
    """An object of a dataclass from its options, each checked against its field's type. Raises ParseError."""
    known = {f.name: f for f in fields(cls) if f.init}
    hints = get_type_hints(cls)
    checked: dict[str, Any] = {}
    for option, value in options.items():
        where = f"{label}{place(option)}"
        if option not in known:
            raise ParseError(f"{label!r} has no option {option!r}", where=where, hint=nearest(option, known))
        checked[option] = fit(value, hints.get(option, Any), f"option {option!r}", where, parse_value)
    required = (n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING)
    if missing := [name for name in required if name not in options]:
        raise ParseError(f"{label!r} needs the option {missing[0]!r}", where=label)
    try:
        return cls(**checked)
    except (TypeError, ValueError) as error:
        if isinstance(error, SparsifyError):
            raise
        raise ParseError(str(error), where=label) from error


class Reader:
    """Turns the syntax tree of one text into values; knows the text, to say where it went wrong."""

    def __init__(self, text: str) -> None:
        self.text = text

    def wrong(self, node: ast.expr, what: str, hint: str = "") -> ParseError:
        return ParseError(f"{what}: {_clip(ast.get_source_segment(self.text, node) or '')}", where=f"column {_column(self.text, node)}", hint=hint)

    def step(self, node: ast.expr) -> tuple[Pass, ...]:
        """One pass or recipe with its options."""
        name, options, places = self.call(node)
        return build_step(name, options, lambda option: f", column {places[option]}" if option in places else "")

    def call(self, node: ast.expr) -> tuple[str, dict[str, Any], dict[str, int]]:
        """Name, options and the columns of the options of `name(option=value, …)`."""
        if isinstance(node, ast.Name):
            return node.id, {}, {}
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise self.wrong(node, "not a pass", "write name(option=value) | name()")
        if node.args:
            raise self.wrong(node.args[0], "an option without its name", f"write {node.func.id}(option=value)")
        options: dict[str, Any] = {}
        for given in node.keywords:
            if given.arg is None:
                raise self.wrong(given.value, "`**` is not allowed here")
            options[given.arg] = self.value(given.value)
        return node.func.id, options, {k.arg: _column(self.text, k.value) for k in node.keywords if k.arg}

    def value(self, node: ast.expr) -> Any:
        """A plain value. A bare name is text; a call is a dataclass of the catalogue."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | bool | None):
            return node.value
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            number = self.value(node.operand)
            if isinstance(number, int | float) and not isinstance(number, bool):
                return -number
        if isinstance(node, ast.Tuple):
            return tuple(self.value(item) for item in node.elts)
        if isinstance(node, ast.List):
            return [self.value(item) for item in node.elts]
        if isinstance(node, ast.Dict) and None not in node.keys:
            return {self.value(k): self.value(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
        if isinstance(node, ast.Call):
            name, options, _ = self.call(node)
            found = named_value(name)
            return build(found, options, name) if isinstance(found, type) else ast.unparse(node)  # a function with options stays text
        raise self.wrong(node, "not a plain value", "numbers, text, tuples, lists, or a dataclass such as NM(n=2, m=4)")


def named_value(name: str) -> Any:
    """What an option's value may call by this name: a class of the catalogue, a function of it, Indexer or Branches. Raises UnknownNameError."""
    if name not in ("Indexer", "Branches"):
        return catalog.find(VALUES, name)
    from .branches import Branches
    from .indexer import Indexer

    return Indexer if name == "Indexer" else Branches


def _print_float(value: float) -> str:
    if math.isnan(value):
        raise ParseError("nan is not a value of an option")
    return ("-" if value < 0 else "") + "1e999" if math.isinf(value) else repr(float(value))


def _expression(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        column = getattr(error, "offset", None)
        raise ParseError(f"cannot read {_clip(text)!r}: {getattr(error, 'msg', None) or error}", where=f"column {column}" if column else "",
                         hint='write "name(option=value) | name()"') from error


def _steps(node: ast.expr) -> list[ast.expr]:
    steps: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        steps.append(node.right)
        node = node.left
    return [node, *reversed(steps)]


def _column(text: str, node: ast.expr) -> int:
    return node.col_offset + 1 + len(text) - len(text.lstrip())


def _clip(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
