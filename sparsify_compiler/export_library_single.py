"""Single images where libraries know batches: convolutions and pools of an input without a batch dimension get one, of one image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .epilogue import META
from .normal_form_edit import insert
from .operands import packed_operator

aten = torch.ops.aten
CONVOLUTION = "conv2d"
# operator -> dimensions of its input with the batch
DIMENSIONS: Mapping[Any, int] = {
    aten.conv1d.default: 3, aten.conv2d.default: 4, aten.conv3d.default: 5, aten.conv1d.padding: 3, aten.conv2d.padding: 4, aten.conv3d.padding: 5,
    aten.conv_transpose1d.default: 3, aten.conv_transpose2d.input: 4, aten.conv_transpose3d.input: 5,
    aten.max_pool1d.default: 3, aten.max_pool2d.default: 4, aten.max_pool3d.default: 5,
    aten.avg_pool1d.default: 3, aten.avg_pool2d.default: 4, aten.avg_pool3d.default: 5,
    aten.adaptive_avg_pool1d.default: 3, aten.adaptive_avg_pool2d.default: 4, aten.adaptive_avg_pool3d.default: 5,
}  # fmt: skip


def with_batch(node: fx.Node) -> None:
    """Write a convolution or a pool of one image as that of a batch of one."""
    wanted = DIMENSIONS[aten.conv2d.default] if packed_operator(node) == CONVOLUTION else DIMENSIONS.get(node.target)
    name = next((one for one in ("x", "input", "self") if one in node.kwargs), "")
    given = node.kwargs.get(name)
    if wanted is None or not isinstance(given, fx.Node) or given.meta["val"].dim() != wanted - 1:
        return
    node.kwargs = {**node.kwargs, name: insert(node, aten.unsqueeze.default, self=given, dim=0)}
    known: Tensor = node.meta["val"]
    node.meta = {**node.meta, "val": known.unsqueeze(0)}
    node.meta.pop(META, None)   # what was computed with it follows the view that is inserted here
    with node.graph.inserting_after(node):
        single = node.graph.create_node("call_function", aten.squeeze.dim, (), {}, name="single")
    single.meta = {**{key: node.meta[key] for key in ("path", "module", "by") if key in node.meta}, "val": known}
    node.replace_all_uses_with(single)
    single.kwargs = {"self": node, "dim": 0}
