"""What a node that has, or may get, a kernel computes with: its stored tensors, its bias, and its other arguments as plain data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from . import catalog
from .epilogue import epilogue_of
from .errors import ArtefactError
from .normal_form_edit import argument, aten, is_call
from .program import Region, get_tensor

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
GEOMETRY = ("stride", "padding", "dilation", "groups")
VIEWS = (aten.slice.Tensor, aten.transpose.int)
PACKED = re.compile(r"sparsify\.(linear|conv2d)_(\w+)\.default")  # ops over a weight in a storage format
DENSE: Mapping[str, Any] = {"linear": aten.linear.default, "conv2d": aten.conv2d.default}  # what each is with a dense weight


def operands(region: Region, node: fx.Node) -> tuple[dict[str, Tensor], dict[str, Any], Tensor | None]:
    """Tensors by the op's own names, attributes, and the bias.

    Attributes of a packed node are the format's and, of a convolution, its geometry; of a dense convolution stride, padding, dilation (one number
    a dimension) and groups. Those of the epilogue, if it has one, come with them. Raises ValueError for metadata that does not fit the graph.
    """
    tensors: dict[str, Tensor] = {}
    attributes: dict[str, Any] = {}
    for name, value in node.kwargs.items():
        if is_stored(value):
            tensors[name] = stored(region, value)
        elif isinstance(value, int | str) and not isinstance(value, bool):
            attributes[name] = value
        elif isinstance(value, list | tuple) and packed_operator(node):
            attributes[name] = list(value)
    if node.target in CONVOLUTIONS:
        attributes |= geometry_of(node, tensors["weight"].dim() - 2)
    return tensors, attributes | epilogue_of(node).attributes(), tensors.pop("bias", None)


def is_stored(value: Any) -> bool:
    """A tensor of the region, or a view of one: half of the gate and up that a model keeps in one parameter."""
    return isinstance(value, fx.Node) and (value.op == "get_attr" or (is_call(value, *VIEWS) and is_stored(value.kwargs["self"])))


def stored(region: Region, value: Any) -> Tensor:
    """The tensor of a node that is_stored."""
    if value.op == "get_attr":
        return get_tensor(region.module, str(value.target))
    view: Tensor = value.target(**{**value.kwargs, "self": stored(region, value.kwargs["self"])})
    return view


def geometry_of(node: fx.Node, dimensions: int) -> dict[str, Any]:
    """stride, padding and dilation of a dense convolution, a list of one number a dimension each, and groups."""
    return {name: _numbers(argument(node, name), dimensions) for name in GEOMETRY[:3]} | {"groups": argument(node, "groups")}


def packed_operator(node: fx.Node) -> str:
    """"linear" or "conv2d" for a node over a weight in a storage format, "" for any other."""
    found = PACKED.fullmatch(str(node.target)) if node.op == "call_function" else None
    return found[1] if found else ""


def packed_form(region: Region, node: fx.Node) -> Any:
    """The stored weight of a packed node, a Format over [N, K] or [O, I / groups * kh * kw]. Raises ArtefactError where it is damaged."""
    tensors, attributes, _ = operands(region, node)
    kind = catalog.get("format", PACKED.fullmatch(str(node.target))[2])  # type: ignore[index]
    return kind.from_tensors(tensors, {name: attributes[name] for name in kind.ATTRIBUTES if name in attributes})


def packed_weight(region: Region, node: fx.Node) -> Tensor:
    """The dense weight of a packed node, [N, K] or [O, I / groups, kh, kw], zeros where nothing is kept. Raises ArtefactError where it is damaged."""
    dense: Tensor = packed_form(region, node).decode()
    _, attributes, _ = operands(region, node)
    if "kernel_size" not in attributes:
        return dense
    height, width = attributes["kernel_size"]
    if min(height, width, attributes["groups"]) < 1 or dense.shape[1] % (height * width) or dense.shape[0] % attributes["groups"]:
        raise ArtefactError(f"a weight of {list(dense.shape)} is none of a {height}x{width} kernel in {attributes['groups']} groups",
                            where=node.name, hint="the stored weight is damaged or was made by another version")
    return dense.view(dense.shape[0], dense.shape[1] // (height * width), height, width)


def with_dense_weight(node: fx.Node, weight: fx.Node) -> fx.Node:
    """A dense node that computes what a packed one does, before it in the graph and without metadata; its weight is `weight`."""
    operator = packed_operator(node)
    rest = {name: node.kwargs[name] for name in ("bias", *GEOMETRY) if node.kwargs.get(name) is not None}
    return node.graph.call_function(DENSE[operator], (), {"input": node.kwargs["x"], "weight": weight, **rest})


def operator_of(node: fx.Node) -> str:
    """The name under which the kernel room knows what a node computes: "linear_bsr", "linear", "conv2d"."""
    return str(node.target).split(".")[1]


def input_of(node: fx.Node) -> fx.Node:
    """The activation that a kernel of this node reads."""
    found = node.kwargs["x" if "x" in node.kwargs else "input"]
    assert isinstance(found, fx.Node)
    return found


def inputs_of(node: fx.Node) -> tuple[fx.Node, ...]:
    """All that a kernel of this node is called with: the activation that it reads, and what the graph computes for it besides (a limit)."""
    first = input_of(node)
    return (first, *[value for value in node.kwargs.values() if isinstance(value, fx.Node) and value is not first and not is_stored(value)])


def _numbers(given: Any, dimensions: int) -> list[int]:
    """One number for each spatial dimension."""
    numbers = [given] if isinstance(given, int) else list(given)
    return numbers * dimensions if len(numbers) == 1 else numbers
