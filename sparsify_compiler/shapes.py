"""Concrete shapes of a graph's values on given example inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .call import call_arguments, flatten_call
from .program import Region

if TYPE_CHECKING:
    from .capture_inputs import ExampleCall


def example_shape(region: Region, node: fx.Node, example: tuple[Any, ...] | Mapping[str, Any] | None) -> tuple[int, ...]:
    """The shape of `node`'s value on the example inputs.

    Dynamic dimensions take the example's sizes when the region is the whole model, and the sizes seen at capture in a region inside it, whose
    inputs the user never gives.
    """
    bound = _bindings(region, example) if region.path == "" and example is not None else {}
    return tuple(_size(dimension, bound) for dimension in node.meta["val"].shape)


def _size(dimension: int | torch.SymInt, bound: Mapping[Any, int]) -> int:
    if isinstance(dimension, int):
        return dimension
    expression = dimension.node.expr
    if expression.free_symbols <= bound.keys():
        return int(expression.subs(bound))
    return size_seen(dimension)


def size_seen(dimension: int | torch.SymInt) -> int:
    """A dimension as it was at capture."""
    from torch.fx.experimental.symbolic_shapes import optimization_hint

    return optimization_hint(dimension)


def note_sizes(region: Region, call: ExampleCall) -> None:
    """Let sizes that come out of a tensor, which only a run tells, be known as what they are on the example inputs."""
    if any(_unknown(size) for node in region.graph.nodes for size in _sizes(node.meta.get("val"))):
        with torch.no_grad():
            _Noting(region.module).run(*flatten_call(region.spec, *call.arguments()))


class _Noting(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        for size, seen in zip(_sizes(n.meta.get("val")), _sizes(result), strict=False):
            if _unknown(size):
                size.node.shape_env.var_to_hint_override.setdefault(size.node.expr, int(seen))
        return result


def _sizes(value: Any) -> tuple[Any, ...]:
    """The dimensions of a tensor, or a number itself."""
    return tuple(value.shape) if isinstance(value, Tensor) else (value,)


def _unknown(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and size.node.expr.is_symbol and not size.node.has_hint()


def _bindings(region: Region, example: tuple[Any, ...] | Mapping[str, Any]) -> dict[Any, int]:
    """Symbol -> size, read off the placeholders."""
    values = flatten_call(region.spec, *call_arguments(example))
    placeholders = [node for node in region.graph.nodes if node.op == "placeholder"]
    bound: dict[Any, int] = {}
    for node, value in zip(placeholders, values, strict=True):
        for dimension, size in zip(getattr(node.meta.get("val"), "shape", ()), getattr(value, "shape", ()), strict=False):
            if isinstance(dimension, torch.SymInt) and dimension.node.expr.is_symbol:
                bound[dimension.node.expr] = size
    return bound
