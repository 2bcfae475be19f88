"""What ops that only rearrange, pick or repeat elements do to dimensions."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from .axis import Axis, UnevenError
from .axis_follow import Dims, Follow, Rule
from .normal_form_edit import argument, aten, is_call, same_size

PIECES = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.tensor_split.sections, aten.tensor_split.indices)


def product(f: Follow, dims: Any) -> Axis:
    """Several dimensions as one."""
    factors: list[int] = []
    for axis in dims:
        if len(axis) == 1:
            factors += axis[0]
        else:  # a sum becomes a factor under a name of its own
            whole = f.axes.new(f.axes.size(axis))
            f.axes.union(whole, axis, f.cause)
            factors += whole[0]
    return (tuple(factors),)


def moved(f: Follow, node: Any) -> Dims:
    """transpose, permute, t."""
    given = f.of(node.kwargs["self"])
    order = list(range(len(given)))
    if is_call(node, aten.permute.default):
        order = [d % len(given) for d in node.kwargs["dims"]]
    elif is_call(node, aten.t.default):
        order.reverse()
    else:
        a, b = node.kwargs["dim0"] % len(given), node.kwargs["dim1"] % len(given)
        order[a], order[b] = b, a
    return tuple(given[d] for d in order)


def reshaped(f: Follow, node: Any) -> Dims:
    """reshape, flatten, unflatten, squeeze, unsqueeze: what stays is the same; in between, one product is another."""
    given, before, after = f.of(node.kwargs["self"]), node.kwargs["self"].meta["val"].shape, node.meta["val"].shape
    new: list[Axis | None] = list(f.fresh(node.meta["val"]))
    start = end = 0
    while start < min(len(before), len(after)) and same_size(before[start], after[start]):
        new[start] = given[start]
        start += 1
    while end < min(len(before), len(after)) - start and same_size(before[-1 - end], after[-1 - end]):
        new[len(after) - 1 - end] = given[len(before) - 1 - end]
        end += 1
    one, other = given[start: len(given) - end], new[start: len(new) - end]
    if None in one or None in other:
        f.fix([*one, *other], f"{f.cause} joins it with a dynamic dimension")
    elif one or other:
        f.axes.union(product(f, one), product(f, other), f.cause)
    return tuple(new)


def expanded(f: Follow, node: Any) -> Dims:
    """A dimension of size 1 that is repeated becomes one of its own."""
    given, sizes = f.of(node.kwargs["self"]), node.meta["val"].shape
    new: list[Axis | None] = list(f.fresh(node.meta["val"]))
    for d in range(-len(given), 0):
        if given[d] is None or new[d] is None:
            new[d] = None if new[d] is None else new[d]
        elif f.axes.size(given[d] or ()) == sizes[d]:
            new[d] = given[d]
    return tuple(new)


def repeated(f: Follow, node: Any) -> Dims:
    """repeat_interleave along one dimension: each index becomes `repeats`."""
    given, dim = f.of(node.kwargs["self"]), argument(node, "dim")
    if dim is None or given[dim] is None or not isinstance(node.kwargs["repeats"], int) or argument(node, "output_size") is not None:
        opaque: Dims = f.opaque(node)
        return opaque
    result = list(given)
    result[dim] = product(f, (given[dim], f.axes.new(node.kwargs["repeats"])))
    return tuple(result)


def joined(f: Follow, node: Any) -> Dims:
    """cat: one behind the other along one dimension; the others are one."""
    parts = [f.of(part) for part in node.kwargs["tensors"]]
    parts = [part for part in parts if part]
    dim = argument(node, "dim") % len(parts[0])
    result = list(parts[0])
    for d in range(len(result)):
        if d == dim:
            along = [part[d] for part in parts]
            result[d] = None if None in along else tuple(term for axis in along for term in axis or ())
            if None in along:
                f.fix([axis for axis in along if axis is not None], f"{f.cause} puts it beside a dynamic dimension")
        else:
            for part in parts[1:]:
                f.same(result[d], part[d])
    return tuple(result)


def taken(f: Follow, node: Any) -> Dims:
    """slice, narrow: a run of one dimension."""
    given = f.of(node.kwargs["self"])
    dim = argument(node, "dim") % len(given)
    axis, size = given[dim], node.meta["val"].shape[dim]
    result = list(given)
    bounds = run_of(node, f.axes.size(axis)) if axis is not None else None
    if axis is None or bounds is None or not isinstance(size, int):
        f.fix(axis, f"{f.cause} takes some of it")
        result[dim] = f.fresh(node.meta["val"], f"{f.cause} took it")[dim]
        return tuple(result)
    result[dim] = _run(f, axis, *bounds)
    return tuple(result)


def run_of(node: Any, size: int) -> tuple[int, int] | None:
    """(start, stop) of a slice or narrow of a dimension of that size; None where it is no run of known place."""
    if is_call(node, aten.narrow.default):
        start, stop, step = node.kwargs["start"], None, 1
        stop = start + node.kwargs["length"] if isinstance(start, int) and isinstance(node.kwargs["length"], int) else None
        if stop is None:
            return None
    else:
        start, stop, step = argument(node, "start"), argument(node, "end"), argument(node, "step")
    if step != 1 or not isinstance(start, int | None) or not isinstance(stop, int | None):
        return None
    first, last, _ = slice(start, stop).indices(size)
    return first, max(first, last)


def _run(f: Follow, axis: Axis, start: int, stop: int) -> Axis:
    try:
        return f.axes.cut(f.axes.cut(axis, start)[1], stop - start)[0]
    except UnevenError:
        f.fix(axis, f"{f.cause} cuts through a product")
        return f.axes.new(stop - start, f"{f.cause} cuts through a product")


def split(f: Follow, node: Any) -> list[Dims]:
    """split, chunk: runs behind each other."""
    given, dim = f.of(node.kwargs["self"]), argument(node, "dim") % len(f.of(node.kwargs["self"]))
    axis, found, start = given[dim], [], 0
    for piece in node.meta["val"]:
        size = piece.shape[dim]
        run: Axis | None = None
        if axis is not None and isinstance(size, int):
            run, start = _run(f, axis, start, start + size), start + size
        found.append((*given[:dim], run, *given[dim + 1:]))
    return found


def picked(f: Follow, node: Any) -> Dims:
    """getitem of several values; select and unbind lose a dimension, which cannot shrink."""
    if node.target is operator.getitem:
        whole = f.values.get(node.args[0])
        known: Dims = whole[node.args[1]] if isinstance(whole, list) and isinstance(node.args[1], int) else f.opaque(node)
        return known
    given = f.of(node.kwargs["self"])
    dim = argument(node, "dim") % len(given)
    f.fix(given[dim], f"{f.cause} picks one of it")
    return (*given[:dim], *given[dim + 1:])


def unbound(f: Follow, node: Any) -> list[Dims]:
    """unbind: as many values as the dimension has indices."""
    return [picked(f, node) for _ in node.meta["val"]]


def stacked(f: Follow, node: Any) -> Dims:
    """stack: a new dimension, which cannot shrink."""
    parts = [f.of(part) for part in node.kwargs["tensors"]]
    for part in parts[1:]:
        for one, other in zip(parts[0], part, strict=True):
            f.same(one, other)
    dim = argument(node, "dim") % (len(parts[0]) + 1)
    return (*parts[0][:dim], f.axes.new(len(parts), f"{f.cause} stacks along it"), *parts[0][dim:])


def indexed(f: Follow, node: Any) -> Dims:
    """x[i, j]: the first dimensions are picked from, and the others stay."""
    given, indices = f.of(node.kwargs["self"]), node.kwargs["indices"]
    if None in indices or not all(f.values.get(index) is not None for index in indices):
        opaque: Dims = f.opaque(node)
        return opaque
    f.fix(given[: len(indices)], f"{f.cause} picks from it")
    rest = given[len(indices):]
    fresh = f.fresh(node.meta["val"], f"{f.cause} picked it")
    return (*fresh[: len(fresh) - len(rest)], *rest)


LAYOUT_RULES: Mapping[Any, Rule] = {
    **dict.fromkeys((aten.transpose.int, aten.permute.default, aten.t.default), moved),
    **dict.fromkeys((aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim,
                     aten.squeeze.dims, aten.squeeze.default), reshaped),
    aten.expand.default: expanded,
    aten.repeat_interleave.self_int: repeated,
    aten.cat.default: joined,
    **dict.fromkeys((aten.slice.Tensor, aten.narrow.default), taken),
    **dict.fromkeys(PIECES, split),
    operator.getitem: picked,
    aten.select.int: picked,
    aten.unbind.int: unbound,
    aten.stack.default: stacked,
    aten.index.Tensor: indexed,
}
