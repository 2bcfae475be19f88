"""Reading a tensor of a region in its graph."""

from __future__ import annotations

from torch import Tensor, fx

from .fakes import fake_like, mode_of
from .program import Region, get_tensor, set_tensor


def reads(region: Region, name: str) -> bool:
    """Does the graph read a tensor of this name?"""
    return any(node.op == "get_attr" and node.target == name for node in region.graph.nodes)


def read_stored(region: Region, before: fx.Node, name: str, by: str, tensor: Tensor | None = None) -> fx.Node:
    """A get_attr in front of a node, told of its provenance. A tensor that is given is stored under the name first (a Parameter stays one)."""
    if tensor is not None:
        set_tensor(region.module, name, tensor)
    with region.graph.inserting_before(before):
        node = region.graph.get_attr(name)
    node.meta = {"by": by, "val": fake_like(get_tensor(region.module, name), mode_of(region))}
    return node


def beside(weight: str, name: str) -> str:
    """The name of a tensor that stands beside a weight: "0.weight" -> "0.<name>", "up_weight" -> "up_<name>", "w1" -> "w1_<name>"."""
    stem = weight.removesuffix("weight")
    return f"{stem}{name}" if stem != weight else f"{weight}_{name}"
