"""The same call on the same arguments is made once. Naming attention may leave a mask added up in every layer; this keeps it one sum."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from .normal_form_edit import Overload


def merge_common(graph: fx.Graph) -> bool:
    """Let later calls that repeat an earlier one use its result. True when the graph changed."""
    first: dict[Hashable, fx.Node] = {}
    changed = False
    for node in list(graph.nodes):
        if not _pure(node):
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        known = first.setdefault(key, node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)
            changed = True
    return changed


def _pure(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, Overload):
        return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags
    return getattr(operator, getattr(node.target, "__name__", ""), None) is node.target


def _key(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_key(item) for item in value)
    return (type(value), value.start, value.stop, value.step) if isinstance(value, slice) else (type(value), value)
