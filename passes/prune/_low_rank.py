"""A low-rank part beside a layer: two dense linear layers whose output is added to the layer's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.fakes import mode_of
from sparsify_compiler.program import Region, get_tensor
from sparsify_compiler.stored import beside, read_stored, reads

aten = torch.ops.aten
MARK = "low_rank_of"  # node meta of the two layers: the path of the layer that they stand beside


def add_low_rank(region: Region, op: fx.Node, weight: fx.Node, factors: tuple[Tensor, Tensor], value: fx.Node | None = None,
                 by: str = "mask_weights") -> None:
    """Rewrite linear(x, W, b) to linear(x, W, b) + linear(linear(value, reads), writes); factors are reads [r, K] and writes [out, r].

    The factors become parameters beside the weight, which the get_attr node `weight` reads. The value is by default what the layer reads.
    """
    path = str(op.meta.get("path", op.name))
    through: Any = op.kwargs["input"] if value is None else value
    for name, factor in zip(("low_rank_reads", "low_rank_writes"), factors, strict=True):
        target = beside(str(weight.target), name)
        trained = get_tensor(region.module, str(weight.target)).requires_grad
        source = read_stored(region, op, target, by, None if reads(region, target) else nn.Parameter(factor, requires_grad=trained))
        with region.graph.inserting_before(op):
            through = _call(region, aten.linear.default, {"input": through, "weight": source, "bias": None}, by)
        through.meta |= {"path": f"{path}.{name}", "module": op.meta.get("module"), MARK: path}
    with region.graph.inserting_after(op):
        total = _call(region, aten.add.Tensor, {"self": op, "other": through}, by)
    op.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def _call(region: Region, target: Any, kwargs: dict[str, Any], by: str) -> fx.Node:
    node = region.graph.call_function(target, (), kwargs)
    with mode_of(region):
        value = target(**{name: given.meta["val"] if isinstance(given, fx.Node) else given for name, given in kwargs.items()})
    node.meta = {"by": by, "val": value}
    return node
