"""Does a value fit the type of an option? Strict, except for what text and YAML cannot say: ints for floats, lists for tuples, names of enums."""

from __future__ import annotations

import types
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from .errors import ParseError, SparsifyError, nearest


class _UnfitError(Exception):
    """The value is not of the type."""


def fit(value: Any, annotation: Any, what: str, where: str, read: Callable[[str], Any]) -> Any:
    """`value` as `annotation` asks for it. Text that does not fit is read once more as a value, so that YAML may say "NM(n=2, m=4)".

    Raises ParseError that starts with `what`.
    """
    for candidate in _readings(value, read):
        try:
            return _fit(candidate, annotation)
        except _UnfitError:
            continue
    if isinstance(value, str) and isinstance(annotation, type) and issubclass(annotation, Enum):
        raise ParseError(f"{what} is {value!r}", where=where, hint=nearest(value, [str(e.value) for e in annotation]))
    raise ParseError(f"{what} must be {_spell(annotation)}, got {value!r}", where=where, hint=_in_a_tuple(value, annotation))


def _in_a_tuple(value: Any, annotation: Any) -> str:
    """What to write where one value stands for a tuple of them."""
    try:
        _fit((value,), annotation)
    except _UnfitError:
        return ""
    return f"write {(value,)!r}"


def _readings(value: Any, read: Callable[[str], Any]) -> list[Any]:
    if not isinstance(value, str):
        return [value]
    try:
        return [value, read(value)]
    except SparsifyError:
        return [value]


def _fit(value: Any, annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value
    if annotation is None or annotation is types.NoneType:
        return _when(value is None, value)
    if origin in (Union, types.UnionType):
        return _fit_union(value, arguments)
    if origin is Literal:
        return _when(any(value == a and type(value) is type(a) for a in arguments), value)
    if (origin or annotation) in (tuple, list):
        return _fit_sequence(value, origin or annotation, arguments)
    if annotation is float:
        return float(_when(isinstance(value, int | float) and not isinstance(value, bool), value))
    if annotation is int:
        return _when(isinstance(value, int) and not isinstance(value, bool), value)
    if isinstance(annotation, type) and issubclass(annotation, Enum) and not isinstance(value, annotation):
        found = [member for member in annotation if member.value == value]
        return _when(bool(found), found[0] if found else None)
    return _when(_is_instance(value, origin or annotation), value)


def _when(fits: bool, value: Any) -> Any:
    if not fits:
        raise _UnfitError
    return value


def _fit_union(value: Any, arguments: tuple[Any, ...]) -> Any:
    """The member that the value is already, or else the first that it can become."""
    results: list[Any] = []
    for argument in arguments:
        try:
            results.append(_fit(value, argument))
        except _UnfitError:
            continue
    same = [result for result in results if type(result) is type(value)]
    return _when(bool(results), (same or results or [None])[0])


def _fit_sequence(value: Any, kind: type, arguments: tuple[Any, ...]) -> Any:
    _when(isinstance(value, tuple | list), value)
    if not arguments or arguments == (Any, ...):
        return kind(value)
    if kind is list or (len(arguments) == 2 and arguments[1] is ...):
        return kind(_fit(item, arguments[0]) for item in value)
    _when(len(value) == len(arguments), value)
    return kind(_fit(item, argument) for item, argument in zip(value, arguments, strict=True))


def _is_instance(value: Any, annotation: Any) -> bool:
    """isinstance, where Python can tell; a Protocol that it cannot check at run time is taken on trust."""
    try:
        return isinstance(value, annotation)
    except TypeError:
        return not isinstance(value, str | int | float | bool | tuple | list | None)


def _spell(annotation: Any) -> str:
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_spell(a) for a in get_args(annotation))
    if get_origin(annotation) is Literal:
        return " or ".join(repr(a) for a in get_args(annotation))
    if annotation is types.NoneType:
        return "None"
    return getattr(annotation, "__name__", None) if get_origin(annotation) is None and isinstance(annotation, type) else str(annotation)  # type: ignore[return-value]
