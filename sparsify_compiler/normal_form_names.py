"""Arguments by name, as the aten schema spells them, in the schema's order; an argument equal to the schema's default is dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .normal_form_edit import Overload

# Arguments that choose an implementation, never a value, at the setting that means nothing: dropped like a default.
_MEANINGLESS: dict[str, tuple[Any, ...]] = {
    "cudnn_enable": (True, False), "pin_memory": (None, False), "non_blocking": (True, False), "layout": (None, torch.strided),
    "implicit": (True, False),
}


def name_arguments(node: fx.Node) -> bool:
    """Rewrite one call in place. True when it changed."""
    if node.op != "call_function" or not isinstance(node.target, Overload):
        return False
    known = node.target._schema.arguments
    given = dict(zip([argument.name for argument in known], node.args, strict=False)) | dict(node.kwargs)
    whole = {a.name: _listed(a, given[a.name]) for a in known if a.name in given}
    kwargs = {a.name: whole[a.name] for a in known if a.name in whole and not _default(a, whole[a.name])}
    if not node.args and list(kwargs) == list(node.kwargs) and all(type(kwargs[k]) is type(v) or isinstance(v, list) for k, v in node.kwargs.items()):
        return False
    node.args, node.kwargs = (), kwargs
    return True


def _listed(argument: Any, value: Any) -> Any:
    """A list where the schema has a list: a tuple becomes one, and the number 1 for int[2] becomes [1, 1]."""
    if not isinstance(argument.type, torch.ListType) and not (
            isinstance(argument.type, torch.OptionalType) and isinstance(argument.type.getElementType(), torch.ListType)):
        return value
    if isinstance(value, (list, tuple)):
        return list(value)
    return [value] * (argument.N or 1) if isinstance(value, int) and not isinstance(value, bool) else value


def _default(argument: Any, value: Any) -> bool:
    if not argument.has_default_value():
        return False
    if argument.name in _MEANINGLESS and _plain(value) and value in _MEANINGLESS[argument.name]:
        return True
    return _plain(value) and _same(value, argument.default_value)


def _plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, type(None), torch.dtype, torch.layout, torch.memory_format)) or (
        isinstance(value, (list, tuple)) and all(_plain(item) for item in value))


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return list(value) == list(default)
    if isinstance(value, torch.memory_format):
        return value is torch.contiguous_format and default == 0
    return (type(value) is type(default) and value == default) or (_number(value) and _number(default) and value == default)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
