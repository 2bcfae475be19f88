"""Following dimensions through captured graphs: every value's dimensions as axes, and which of them are one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .axis import Axes, Axis
from .fold import constants
from .pattern import op_name
from .program import Program, Region, get_tensor

Dims = tuple[Axis | None, ...]  # of one tensor; None for a dynamic size
Rule = Callable[["Follow", Any], Any]  # (what is known so far, a call) -> the dimensions of its result, or a list of them where it has several


@dataclass
class Follow:
    """What is known of the dimensions of a Program.

    values   node -> the dimensions of its value; a list of them where it has several
    tensors  identity of a parameter or buffer -> its dimensions; the same for all that are tied
    marks    (kind, axis, region, node): where an axis was seen in a special role, such as "heads"
    cause    the node that is looked at; `region` is where, `constants` what depends there on parameters alone
    """

    axes: Axes = field(default_factory=Axes)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    tensors: dict[Hashable, Dims] = field(default_factory=dict)
    marks: list[tuple[str, Axis, Region, fx.Node]] = field(default_factory=list)
    region: Region | None = None
    constants: set[fx.Node] = field(default_factory=set)
    cause: str = ""

    def of(self, node: Any) -> Dims:
        """The dimensions of a node's value; none for a number or a list."""
        found = self.values.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, tuple) else ()

    def fresh(self, value: Any, reason: str | None = None) -> Any:
        """New dimensions for a value like this fake one; with a reason, such as cannot shrink."""
        if isinstance(value, Tensor):
            empty = any(isinstance(size, int) and size == 0 for size in value.shape)
            return tuple(self.axes.new(size, reason) if isinstance(size, int) and not empty else None for size in value.shape)
        return [self.fresh(one, reason) for one in value] if isinstance(value, list | tuple) else ()

    def same(self, one: Axis | None, other: Axis | None) -> Axis | None:
        """Two dimensions that are one; of a known and a dynamic one the known cannot shrink."""
        if one is None or other is None:
            self.fix(one if other is None else other, "meets a dynamic dimension")
            return None
        if self.axes.size(one) != self.axes.size(other):
            self.fix(one, f"{self.cause} joins dimensions of different size")
            self.fix(other, f"{self.cause} joins dimensions of different size")
        else:
            self.axes.union(one, other, self.cause)
        return one

    def fix(self, dims: Axis | Iterable[Axis | None] | None, reason: str) -> None:
        """Nothing of these can shrink."""
        if dims is None:
            return
        for axis in dims if _are_many(dims) else (dims,):
            if axis is not None:
                self.axes.fix(axis, reason)  # type: ignore[arg-type]

    def mark(self, kind: str, axis: Axis | None, node: fx.Node) -> None:
        """Note that an axis plays a role here."""
        if axis is not None and self.region is not None:
            self.marks.append((kind, axis, self.region, node))

    def opaque(self, node: fx.Node, reason: str = "") -> Any:
        """A call that is not looked through: nothing that it reads or gives can shrink."""
        reason = reason or f"{self.cause} is not looked through"
        for source in node.all_input_nodes:
            found = self.values.get(source)
            for dims in found if isinstance(found, list) else [found]:
                self.fix(dims, reason)
        return self.fresh(node.meta.get("val"), reason)


def _are_many(dims: Any) -> bool:
    """Dimensions of a tensor, rather than one axis, whose terms are tuples of numbers."""
    return any(axis is None or (axis and isinstance(axis[0], tuple)) for axis in dims)


def follow(program: Program) -> Follow:
    """Walk over all regions, in the order of execution."""
    from .axis_rules import RULES

    found = Follow()
    eager = {identity(tensor): name for name, tensor in _held(program)}
    for region in program.regions.values():
        found.region, found.constants = region, constants(region.graph)
        for node in region.graph.nodes:
            found.cause = f"{op_name(node)} ({region.qualified(node.name)})"
            if node.op == "placeholder":
                found.values[node] = found.fresh(node.meta.get("val"), "is an input of the model" if not region.path else _edge("an input", region))
            elif node.op == "get_attr":
                found.values[node] = _stored(found, region, node, eager)
            elif node.op == "output":
                found.opaque(node, "is an output of the model" if not region.path else _edge("an output", region))
            elif isinstance(node.meta.get("val"), Tensor | list | tuple):
                rule = RULES.get(node.target)
                found.values[node] = found.opaque(node) if rule is None else rule(found, node)
    return found


def identity(tensor: Tensor) -> Hashable:
    """Equal for two names of the same numbers in memory."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _stored(found: Follow, region: Region, node: fx.Node, eager: Mapping[Hashable, str]) -> Dims:
    tensor = get_tensor(region.module, str(node.target))
    key = identity(tensor)
    if key not in found.tensors:
        reason = None
        if key in eager:
            reason = f"{eager[key]}, outside of what was captured, is the same tensor"
        elif not tensor.is_floating_point() and tensor.dtype != torch.bool:
            reason = f"{node.target} is stored as {str(tensor.dtype).removeprefix('torch.')}: only float weights can shrink"
        found.tensors[key] = found.fresh(tensor, reason)
    return found.tensors[key]


def _edge(what: str, region: Region) -> str:
    return f"is {what} of {region.path}, which eager Python calls: only a model that was captured whole is followed further"


def _held(program: Program) -> list[tuple[str, Tensor]]:
    if program.skeleton is None:
        return []
    return [*program.skeleton.named_parameters(remove_duplicate=False), *program.skeleton.named_buffers(remove_duplicate=False)]
