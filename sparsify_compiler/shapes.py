"""Concrete shapes of a graph's values on given example inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from .call import call_arguments, flatten_call
from .program import Region


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
    return int(dimension.node.hint)


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
