"""Shapes and dtypes without numbers: the fake tensors that nodes carry as "val", and new ones in the same mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .program import Region, get_tensor


def mode_of(region: Region) -> FakeTensorMode:
    """The mode in which the region was captured (its dynamic sizes live there), or a new one."""
    for node in region.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode()


def fake_like(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor with this tensor's shape, dtype, strides and device; every size is fixed."""
    with torch.no_grad():
        fake: Tensor = mode.from_tensor(tensor.detach(), static_shapes=True)
    return fake


def fake_of(region: Region, node: fx.Node, mode: FakeTensorMode) -> Any:
    """The fake value of a node: of the tensor itself for a get_attr, otherwise what its metadata says."""
    return fake_like(get_tensor(region.module, str(node.target)), mode) if node.op == "get_attr" else node.meta["val"]


def recompute(region: Region) -> Iterator[tuple[fx.Node, str, str]]:
    """Run every op on fake tensors; yields (node, what its metadata says, what the op gives) where they differ."""
    mode = mode_of(region)
    with torch.no_grad(), mode:
        for node in region.graph.nodes:
            if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
                continue
            arguments = fx.map_arg(node.kwargs, lambda n: fake_of(region, n, mode))
            found = node.target(*fx.map_arg(node.args, lambda n: fake_of(region, n, mode)), **arguments)
            if _spell(found) != _spell(node.meta["val"]):
                yield node, _spell(node.meta["val"]), _spell(found)


def _spell(value: Any) -> str:
    return f"{value.dtype} [{', '.join(map(str, value.shape))}]" if isinstance(value, Tensor) else str(type(value))
