"""What a node of a graph costs, by the formulas of cost_models: operations and bytes, before anything is timed.

Used where a rewrite has to pay: the nodes that go are compared with the nodes that come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from . import catalog
from .pattern import op_name
from .shapes import size_seen

CONVS = frozenset({"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
# Ops that only look at their input in another way: nothing is computed, nothing moves.
VIEWS = frozenset({"view", "reshape", "permute", "transpose", "slice", "narrow", "chunk", "split", "split_with_sizes", "unsqueeze", "squeeze",
                   "flatten", "expand", "getitem", "select", "unbind", "alias", "t", "sym_size"})
MOVES = frozenset({"cat", "stack", "pad", "constant_pad_nd", "contiguous", "clone", "copy", "slice_scatter", "index"})
LOOKUPS = frozenset({"embedding", "index_select"})     # read as much of a table as they write
PRODUCTS = frozenset({"mm", "bmm", "matmul"})
BALANCE = 8.0  # operations that a CPU core does while it moves one byte from memory; only to weigh the two against each other


@dataclass(frozen=True)
class Cost:
    """Operations and bytes moved."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    @property
    def work(self) -> float:
        """Both as one number, in operations: what is minimised among rewrites that raise neither."""
        return self.flops + BALANCE * self.bytes

    def dearer(self, than: Cost) -> str | None:
        """"FLOPs from 1.2 M to 3.4 M" when this raises FLOPs or bytes above the other; None when it raises neither."""
        raised = [f"{name} from {quantity(old)} to {quantity(new)}"
                  for name, old, new in (("FLOPs", than.flops, self.flops), ("bytes", than.bytes, self.bytes)) if new > old * (1 + 1e-9)]
        return " and ".join(raised) or None


def quantity(value: float) -> str:
    """A number to read: 1200000 is "1.2 M"."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.0f}"


def total(nodes: Iterable[fx.Node]) -> Cost:
    """The cost of several nodes."""
    return sum((node_cost(node) for node in nodes), Cost())


def node_cost(node: fx.Node) -> Cost:
    """Operations and bytes of one node, by the shapes that it carries; a dynamic size counts as it was at capture."""
    found = node_sizes(node)
    return Cost() if found is None else cost_of(*found)


def node_sizes(node: fx.Node) -> tuple[str, dict[str, float]] | None:
    """(name of the op's formulas, the numbers that they ask for) of one node; None of one that computes and moves nothing."""
    name = op_name(node)
    if node.op != "call_function" or name in VIEWS or not isinstance(node.meta.get("val"), Tensor):
        return None
    out: Tensor = node.meta["val"]
    if name == "linear" or name in CONVS:
        source, weight = _value(node.kwargs["input"]), _value(node.kwargs["weight"])
        return "conv2d", _conv_sizes(source, weight, out, "transpose" in name)
    if name == "scaled_dot_product_attention":
        return "attend", _attention_sizes(_value(node.kwargs["query"]), _value(node.kwargs["key"]), _value(node.kwargs["value"]), out)
    if name in LOOKUPS:
        return "elementwise", _sizes(size(out), size(out), out.element_size(), 0)
    inputs = [_value(one) for one in node.all_input_nodes]
    return "elementwise", _sizes(sum(size(value) for value in inputs), size(out), out.element_size(), _operations(name, node, inputs))


def _attention_sizes(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> dict[str, float]:
    """Of every query with every key, whatever a mask leaves out."""
    rows, width = size(query) // max(size_seen(query.shape[-1]), 1), size_seen(value.shape[-1])
    return {"M": rows, "K": size_seen(query.shape[-1]), "E": width, "pairs": rows * size_seen(key.shape[-2]), "block_q": 1, "block_k": 1, "listed": 0,
            "read": size(query) + size(key) + size(value), "written": size(out), "x_bytes": out.element_size()}


def _operations(name: str, node: fx.Node, inputs: list[Any]) -> int:
    """Operations for each element of the result."""
    if name in MOVES:
        return 0
    if name in PRODUCTS:
        return 2 * size_seen(inputs[0].shape[-1])
    taps = math.prod(_numbers(node.kwargs.get("kernel_size", 1)))
    return 2 * taps if name in ("batch_norm", "addcmul") else taps


def conv_cost(source: Any, weight: Any, out: Any, transposed: bool = False) -> Cost:
    """Of a linear (weight [N, K]) or a conv (weight [N, K / groups, ...]) from its input, weight and output, or whatever has their shapes."""
    return cost_of("conv2d", _conv_sizes(source, weight, out, transposed))


def _conv_sizes(source: Any, weight: Any, out: Any, transposed: bool) -> dict[str, float]:
    outputs, taken = int(weight.shape[0]), int(weight.shape[1])
    taps = math.prod(int(s) for s in weight.shape[2:])
    places = size(source) // max(int(weight.shape[0]), 1) if transposed else size(out) // max(outputs, 1)
    return {"M": places, "N": outputs, "K": taken, "taps": taps, "read": size(source), "written": size(out),
            "x_bytes": out.dtype.itemsize, "value_bytes": out.dtype.itemsize}


def elementwise_cost(read: int, written: int, itemsize: int, taps: int = 1) -> Cost:
    """Of one pass over tensors, from element counts."""
    return cost_of("elementwise", _sizes(read, written, itemsize, taps))


def _sizes(read: int, written: int, itemsize: int, taps: int) -> dict[str, float]:
    return {"read": read, "written": written, "taps": taps, "x_bytes": itemsize}


def size(value: Any) -> int:
    """Elements of a tensor, fake or real; a dynamic size counts as it was at capture."""
    return math.prod(size_seen(dimension) for dimension in value.shape)


def _value(node: Any) -> Any:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else torch.empty(0, dtype=torch.float32, device="meta")


def _numbers(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]


def cost_of(name: str, values: Mapping[str, float]) -> Cost:
    """Of an op by its name in the catalogue, from the numbers that its formulas ask for. Raises KeyError for one that is missing."""
    flops, moved = _compiled(name)
    return Cost(flops(values), moved(values))


@cache
def _compiled(name: str) -> tuple[Callable[[Mapping[str, float]], float], Callable[[Mapping[str, float]], float]]:
    """FLOPS and BYTES of a formula as plain functions."""
    module, compiled = catalog.get("cost", name), catalog.get("cost model", "symbols").compiled
    return compiled(module.FLOPS), compiled(module.BYTES)
