"""The mask of a linear that runs beside a dense one on the same input: it says where the change may be, not what the sum keeps."""

from __future__ import annotations

from torch import fx

from sparsify_compiler.fold import Fold, evaluate, is_mask_product, store
from sparsify_compiler.normal_form_edit import aten, is_call
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Region


def unmask_changes(region: Region, ctx: Context, by: str) -> None:
    """In linear(x, w, b) + linear(x, change * places) store the product as one weight, so that the two can be merged."""
    for node in list(region.graph.nodes):
        if not is_call(node, aten.add.Tensor):
            continue
        pair = [node.kwargs["self"], node.kwargs["other"]]
        for dense, other in (pair, pair[::-1]):
            if _stored(dense) and _masked(region, other) and dense.kwargs["input"] is other.kwargs["input"] and ctx.spend():
                product = other.kwargs["weight"]
                store(region, Fold(product, evaluate(region, product), None), by)


def _stored(node: object) -> bool:
    """A linear with a weight that is no masked one."""
    return is_call(node, aten.linear.default) and isinstance(node.kwargs["weight"], fx.Node) and node.kwargs["weight"].op == "get_attr"


def _masked(region: Region, node: object) -> bool:
    """A linear over weight * mask that nothing else reads."""
    if not is_call(node, aten.linear.default) or len(node.users) != 1:
        return False
    weight = node.kwargs["weight"]
    return isinstance(weight, fx.Node) and is_mask_product(region, weight) and len(weight.users) == 1
