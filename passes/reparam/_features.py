"""Where the features of a value lie after it was only looked at in another way: reshaped, transposed, sliced elsewhere, put beside others."""

from __future__ import annotations

from typing import Any

from torch import fx

from sparsify_compiler.normal_form_edit import argument, aten, is_call, same_shape, same_size, shape

_RESHAPES = (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default)
_SLICES = (aten.slice.Tensor, aten.index_select.default, aten.narrow.default, aten.flip.default, aten.roll.default)


def follow(node: fx.Node, source: fx.Node, dim: int) -> int | None:
    """The dimension of `node` at which the features of `source` at `dim` lie, each one whole and in order; None where `node` does more to them."""
    before, after = shape(source), shape(node)
    if before is None or after is None or node.op != "call_function":
        return None
    if is_call(node, *_RESHAPES):
        return _reshaped(before, after, dim)
    if is_call(node, aten.transpose.int, aten.t.default):
        pair = (0, 1) if is_call(node, aten.t.default) else (node.kwargs["dim0"] % len(before), node.kwargs["dim1"] % len(before))
        return {pair[0]: pair[1], pair[1]: pair[0]}.get(dim, dim)
    if is_call(node, aten.permute.default):
        return [d % len(before) for d in node.kwargs["dims"]].index(dim)
    if is_call(node, aten.expand.default):
        moved = dim + len(after) - len(before)
        return moved if same_size(before[dim], after[moved]) else None
    return _elsewhere(node, len(before), len(after), dim)


def _reshaped(before: tuple[Any, ...], after: tuple[Any, ...], dim: int) -> int | None:
    behind = len(before) - dim
    if len(after) >= behind and same_shape(before[dim:], after[len(after) - behind:]):
        return len(after) - behind
    return dim if same_shape(before[: dim + 1], after[: dim + 1]) else None


def _elsewhere(node: fx.Node, dims: int, left: int, dim: int) -> int | None:
    """Ops that take a part of other dimensions, or put values beside each other along them."""
    if is_call(node, *_SLICES):
        along = argument(node, "dims") if is_call(node, aten.flip.default, aten.roll.default) else [argument(node, "dim")]
        return None if not along or dim in [d % dims for d in along] else dim
    if is_call(node, aten.select.int):
        taken = node.kwargs["dim"] % dims
        return None if taken == dim else dim - (taken < dim)
    if is_call(node, aten.cat.default):
        return None if argument(node, "dim") % dims == dim else dim
    if is_call(node, aten.index.Tensor):
        return left - 1 if dim == dims - 1 and len(node.kwargs["indices"]) < dims else None
    return None


def origin(node: fx.Node, source: fx.Node, dim: int) -> int | None:
    """The dimension of `source` whose features lie at `dim` of `node`: `follow` the other way round."""
    return next((d for d in range(len(shape(source) or ())) if follow(node, source, d) == dim), None)
