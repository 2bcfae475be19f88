"""Masks that go when adapters are merged.

The mask of a linear that runs beside a dense one on the same input says where the change may be, not what the sum keeps. That of a layer goes where
the user wants one dense weight of it and of the low-rank one beside it.
"""

from __future__ import annotations

from torch import fx

from sparsify_compiler.fold import Fold, evaluate, is_mask_product, store
from sparsify_compiler.normal_form_edit import aten, is_call
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Region


def unmask_changes(region: Region, ctx: Context, by: str, fill: bool) -> None:
    """In linear(x, w, b) + linear(x, change * places) store the product as one weight, so that the two can be merged.

    fill  so too in linear(x, w * mask, b) + s * linear(linear(x, p), u)
    """
    for node in list(region.graph.nodes):
        if not is_call(node, aten.add.Tensor):
            continue
        pair = [node.kwargs["self"], node.kwargs["other"]]
        for dense, other in (pair, pair[::-1]):
            change = _masked(region, other) and (_stored(dense) and dense.kwargs["input"] is other.kwargs["input"])
            if (change or (fill and _masked(region, other) and _is_low_rank(dense, other.kwargs["input"]))) and ctx.spend():
                product = other.kwargs["weight"]
                store(region, Fold(product, evaluate(region, product), None), by)


def _is_low_rank(node: object, x: object) -> bool:
    """Two linears after each other on x, times a number or not."""
    inner = node.kwargs["self"] if is_call(node, aten.mul.Tensor) else node
    first = inner.kwargs["input"] if _stored(inner) and is_call(inner, aten.linear.default) else None
    return _stored(first) and is_call(first, aten.linear.default) and first.kwargs["input"] is x


def _stored(node: object) -> bool:
    """A linear with a weight that is no masked one."""
    return is_call(node, aten.linear.default) and isinstance(node.kwargs["weight"], fx.Node) and node.kwargs["weight"].op == "get_attr"


def _masked(region: Region, node: object) -> bool:
    """A linear over weight * mask that nothing else reads."""
    if not is_call(node, aten.linear.default) or len(node.users) != 1:
        return False
    weight = node.kwargs["weight"]
    return isinstance(weight, fx.Node) and is_mask_product(region, weight) and len(weight.users) == 1
