"""The signature of a captured module's forward(): that of the model that it was captured from, so that it is bound, captured and exported like it."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from functools import cache
from typing import Any

from .program import InputSpec


def spelled(kind: type[Any], spec: InputSpec) -> type[Any]:
    """The class with a forward() whose signature says the model's own parameters."""
    return _spelled(kind, tuple(_parameters(spec)))  # type: ignore[arg-type]  # a class is hashable


def _parameters(spec: InputSpec) -> Iterator[inspect.Parameter]:
    """Of the model's own forward(), as far as they have names; *args and **kwargs where they have not."""
    if not spec.parameters:
        yield inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)
        yield inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
        return
    given, optional = set(spec.in_spec.children()[1].context), False
    for name in spec.parameters:
        optional |= name not in given  # behind one that has a default, all have
        default = spec.defaults.get(name) if optional else inspect.Parameter.empty
        yield inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)


@cache
def _spelled(kind: type[Any], parameters: tuple[inspect.Parameter, ...]) -> type[Any]:
    own = kind.forward
    forward: Any = types.FunctionType(own.__code__, own.__globals__, own.__name__, own.__defaults__, own.__closure__)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = inspect.Signature([first, *parameters])
    forward.__doc__ = own.__doc__
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
