"""Submodules of one build share one export: the thirty MLPs of a language model are traced once, each graph over its own tensors."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, fx, nn

from .capture_inputs import ExampleCall
from .program import Region, set_tensor

_INTERNAL = frozenset(vars(nn.Module()))


def build_of(module: nn.Module, call: ExampleCall) -> Hashable:
    """What decides a module's graph: classes, plain attributes, shapes of its tensors and which are tied, and how it is called.

    Two modules with equal builds run the same code on the same attributes; an attribute that is no plain value counts by identity.
    """
    order: dict[int, int] = {}
    parts: list[Hashable] = []
    for name, part in module.named_modules(remove_duplicate=False):
        attributes = tuple((key, _plain(value)) for key, value in vars(part).items() if key not in _INTERNAL)
        tensors = tuple((key, None if t is None else (type(t), tuple(t.shape), t.dtype, t.stride(), order.setdefault(id(t), len(order))))
                        for key, t in [*part._parameters.items(), *part._buffers.items()])
        parts.append((name, type(part), attributes, tensors, len(part._forward_hooks), len(part._forward_pre_hooks)))
    leaves = tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else (type(x), x) for x in call.leaves)
    return tuple(parts), leaves, tuple(tuple(axes.items()) for axes in call.axes), str(call.structure)


def _plain(value: Any) -> Hashable:
    if isinstance(value, (bool, int, float, str, type(None))):
        return type(value), value
    if isinstance(value, (tuple, list)) and all(isinstance(item, (bool, int, float, str, type(None))) for item in value):
        return type(value), tuple(value)
    return "object", id(value)


def reuse(region: Region, module: nn.Module, path: str) -> Region:
    """The region of another module of the same build: the same graph, in normal form already, over this module's tensors."""
    own = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    fresh = region.clone()
    root = nn.Module()
    for name, tensor in [*fresh.module.named_parameters(remove_duplicate=False), *fresh.module.named_buffers(remove_duplicate=False)]:
        set_tensor(root, name, own.get(name, tensor))
    for node in fresh.graph.nodes:
        old = node.meta.get("path", "")
        if old == region.path or old.startswith(f"{region.path}."):
            node.meta["path"] = path + old[len(region.path):]
    return Region(path, fx.GraphModule(root, fresh.graph), region.spec)
