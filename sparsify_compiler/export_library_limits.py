"""How large the symbols of a whole graph may be together: kernels count the elements of a tensor in 32 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .program import Region, TensorSpec

ELEMENTS = (1 << 31) - 1


def limits_of(region: Region) -> list[dict[str, Any]]:
    """[{"symbols": names, "product": n}]: the sizes of these symbols, multiplied, are at most n; only where their ranges allow them to pass it."""
    names = _names(region)
    most: dict[tuple[str, ...], int] = {}
    for node in region.graph.nodes:
        value = node.meta.get("val")
        found = _monomial(value, names) if isinstance(value, Tensor) else None
        if found is not None and found[0]:
            most[found[0]] = max(most.get(found[0], 1), found[1])
    limits = {symbols: ELEMENTS // elements for symbols, elements in most.items()}
    ranges = region.spec.ranges
    return [{"symbols": list(symbols), "product": limit} for symbols, limit in sorted(limits.items()) if _reachable(symbols, limit, ranges)]


def _names(region: Region) -> dict[Any, str]:
    """Symbols of the graph by what the inputs call them."""
    placeholders = [node for node in region.graph.nodes if node.op == "placeholder"]
    return {seen.node.expr: size for node, leaf in zip(placeholders, region.spec.leaves, strict=False) if isinstance(leaf, TensorSpec)
            for size, seen in zip(leaf.shape, node.meta["val"].shape, strict=True) if isinstance(size, str) and isinstance(seen, torch.SymInt)}


def _monomial(value: Tensor, names: Mapping[Any, str]) -> tuple[tuple[str, ...], int] | None:
    """The number of elements as symbols times a number; None where it is something else."""
    symbols: list[str] = []
    number = 1
    sizes: list[Any] = list(value.shape)
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
