"""What a node that has, or may get, a kernel computes with: its stored tensors, its bias, and its other arguments as plain data."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from .epilogue import epilogue_of
from .normal_form_edit import argument, aten
from .program import Region, get_tensor

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
GEOMETRY = ("stride", "padding", "dilation", "groups")


def operands(region: Region, node: fx.Node) -> tuple[dict[str, Tensor], dict[str, Any], Tensor | None]:
    """Tensors by the op's own names, attributes, and the bias.

    Attributes of a packed node are the format's; of a convolution stride, padding, dilation (one number a dimension) and groups. Those of the
    epilogue, if it has one, come with them. Raises ValueError for metadata that does not fit the graph.
    """
    tensors: dict[str, Tensor] = {}
    attributes: dict[str, Any] = {}
    for name, value in node.kwargs.items():
        if isinstance(value, fx.Node) and value.op == "get_attr":
            tensors[name] = get_tensor(region.module, str(value.target))
        elif isinstance(value, int) and not isinstance(value, bool):
            attributes[name] = value
    if node.target in CONVOLUTIONS:
        attributes |= {name: _numbers(argument(node, name), tensors["weight"].dim() - 2) for name in GEOMETRY[:3]}
        attributes["groups"] = argument(node, "groups")
    return tensors, attributes | epilogue_of(node).attributes(), tensors.pop("bias", None)


def operator_of(node: fx.Node) -> str:
    """The name under which the kernel room knows what a node computes: "linear_bsr", "linear", "conv2d"."""
    return str(node.target).split(".")[1]


def input_of(node: fx.Node) -> fx.Node:
    """The activation that a kernel of this node reads."""
    found = node.kwargs["x" if "x" in node.kwargs else "input"]
    assert isinstance(found, fx.Node)
    return found


def _numbers(given: Any, dimensions: int) -> list[int]:
    """One number for each spatial dimension."""
    numbers = [given] if isinstance(given, int) else list(given)
    return numbers * dimensions if len(numbers) == 1 else numbers
