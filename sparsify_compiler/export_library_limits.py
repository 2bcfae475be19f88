"""How large the symbols of a whole graph may be together: kernels count the elements of a tensor in 32 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .export_library_selections import FORMULAS
from .program import Region, TensorSpec

ELEMENTS = (1 << 31) - 1


def limits_of(region: Region) -> list[dict[str, Any]]:
    """[{"symbols": names, "product": n}]: the sizes of these symbols, multiplied, are at most n; only where their ranges allow them to pass it."""
    names = symbol_names(region)
    most: dict[tuple[str, ...], int] = {}
    for node in region.graph.nodes:
        for shape in (_shape(node.meta.get("val")), _held(node)):
            found = _monomial(shape, names)
            if found is not None and found[0]:
                most[found[0]] = max(most.get(found[0], 1), found[1])
    limits = {symbols: ELEMENTS // elements for symbols, elements in most.items()}
    ranges = region.spec.ranges
    return [{"symbols": list(symbols), "product": limit} for symbols, limit in sorted(limits.items()) if _reachable(symbols, limit, ranges)]


def symbol_names(region: Region) -> dict[Any, str]:
    """Symbols of the graph by what the inputs call them."""
    placeholders = [node for node in region.graph.nodes if node.op == "placeholder"]
    return {seen.node.expr: size for node, leaf in zip(placeholders, region.spec.leaves, strict=False) if isinstance(leaf, TensorSpec)
            for size, seen in zip(leaf.shape, node.meta["val"].shape, strict=True) if isinstance(size, str) and isinstance(seen, torch.SymInt)}


def _shape(value: Any) -> list[Any]:
    return list(value.shape) if isinstance(value, Tensor) else []


def _held(node: fx.Node) -> list[Any]:
    """The shape of what the kernels of an FFN hold of its neurons: those of every row, and of every expert that it chose."""
    gate = node.kwargs.get("gate") if node.target in FORMULAS else None
    if not isinstance(gate, fx.Node):
        return []
    rows: Any = node.kwargs.get("chosen", node.kwargs["x"])
    sizes = _shape(rows.meta["val"])
    return [*(sizes if "chosen" in node.kwargs else sizes[:-1]), max(_shape(gate.meta["val"])[-2:])]


def _monomial(sizes: list[Any], names: Mapping[Any, str]) -> tuple[tuple[str, ...], int] | None:
    """The number of elements as symbols times a number; None where it is something else."""
    symbols: list[str] = []
    number = 1
    for size in sizes:
        if isinstance(size, int):
            number *= max(size, 1)
        elif size.node.expr in names:
            symbols.append(names[size.node.expr])
        else:
            return None
    return tuple(sorted(symbols)), number


def _reachable(symbols: tuple[str, ...], limit: int, ranges: Mapping[str, tuple[int, int | None]]) -> bool:
    largest = 1
    for name in symbols:
        high = ranges.get(name, (1, None))[1]
        if high is None:
            return True
        largest *= high
    return largest > limit
