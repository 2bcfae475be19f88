"""Maps that only move values: pads, slices, writes at the border, splits, joins and picks of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sparsify_compiler.passes.reparam._affine import Affine, scale, select, stack, with_shift
from sparsify_compiler.passes.reparam._affine import linear_part_is_zero as nothing_read
from sparsify_compiler.passes.reparam._compose import compose
from sparsify_compiler.passes.reparam._lattice import Inexact, Lattice
from sparsify_compiler.passes.reparam._space import Known, Space, named
from sparsify_compiler.pattern import op_name

aten = torch.ops.aten


def pad(space: Space, node: fx.Node, known: Known) -> Affine:
    """Zeros, or a number, around the places; zeros around the channels."""
    inner, pads = known[named(node)["self"]], list(named(node)["pad"])
    rank = len(inner.lattices)
    if named(node).get("mode", "constant") != "constant" or not all(isinstance(p, int) for p in pads):
        raise Inexact(f"padding of mode {named(node).get('mode')} is not shift-invariant at the border")
    pairs = [(pads[i], pads[i + 1]) for i in range(0, len(pads), 2)] + [(0, 0)] * (rank + 2 - len(pads) // 2)
    channel, batch = (pairs[0], pairs[1:]) if space.channels_last else (pairs[rank], pairs[rank + 1:])
    if any(pair != (0, 0) for pair in batch) or min(channel) < 0:
        raise Inexact("pads the batch")
    value = float(named(node).get("value") or 0.0)
    if value and channel != (0, 0):
        raise Inexact("pads the channels with a number")
    padded = _padded(space, node, inner, [] if space.channels_last else pairs[:rank][::-1], value)
    if channel == (0, 0):
        return padded
    rows = torch.cat([torch.full((channel[0],), -1), torch.arange(padded.outputs), torch.full((channel[1],), -1)])
    return select(padded, rows)


def _padded(space: Space, node: fx.Node, inner: Affine, pairs: Sequence[tuple[int, int]], value: float) -> Affine:
    lattices = [Lattice(-left, reach=left + right - 1) for left, right in pairs]
    ones = torch.ones(inner.outputs, dtype=torch.float64)
    own = scale(ones, torch.zeros_like(ones), inner.output_places, lattices)
    if value:
        places = [n for n in inner.output_places if n is not None]
        if len(places) < len(lattices):
            raise Inexact("the border: it is padded with a number, and with dynamic sizes its exact form cannot be stored")
        inside = own.linear(torch.ones(1, own.channels, *places, dtype=torch.float64))[0]
        own = with_shift(own, value * (1 - inside), 0.0)
    return compose(own, inner, space.tolerance(node))


def slice_of(space: Space, node: fx.Node, known: Known) -> Affine:
    """slice and narrow, of channels or of places."""
    inner, value = known[named(node)["self"]], named(node)["self"].meta["val"]
    dim, name = int(named(node).get("dim", 0)) % value.dim(), op_name(node)
    size = value.shape[dim]
    begin, end, step = _interval(node, size, name)
    if dim == space.dim(value):
        return select(inner, torch.arange(inner.outputs)[begin:end:step])
    lattices = [Lattice()] * len(inner.lattices)
    lattices[dim - 2] = Lattice(begin, stride=step, reach=end - begin - 1 - size)
    ones = torch.ones(inner.outputs, dtype=torch.float64)
    return compose(scale(ones, torch.zeros_like(ones), inner.output_places, lattices), inner, space.tolerance(node))


def _interval(node: fx.Node, size: Any, name: str) -> tuple[int, int, int]:
    if not isinstance(size, int):
        raise Inexact("it takes a part of a dynamic dimension")
    if name == "narrow":
        begin = int(named(node)["start"])
        return begin % size if size else 0, (begin % size if size else 0) + int(named(node)["length"]), 1
    bounds = [named(node).get(k) for k in ("start", "end", "step")]
    if not all(v is None or isinstance(v, int) for v in bounds):
        raise Inexact("it takes a part of dynamic size")
    return slice(*bounds).indices(size)


def written_over(space: Space, node: fx.Node, known: Known) -> Affine:
    """slice_scatter of constants over places that read nothing but zeros: what DBB's padding with the norm's shift is."""
    inner, value = known[named(node)["self"]], node.meta["val"]
    dim = int(named(node).get("dim", 0)) % value.dim()
    src = space.constant(_unexpanded(named(node)["src"]))
    if src is None or dim < 2 or space.channels_last or not all(isinstance(s, int) for s in value.shape[1:]):
        raise Inexact("it writes over a part of the value")
    begin, end, step = _interval(node, value.shape[dim], "slice")
    if step != 1 or not nothing_read(inner, dim - 2, begin, end):
        raise Inexact("the border: it writes over places that have values")
    shift = inner.shift.reshape(-1, *[1] * (value.dim() - 2)) if not inner.spatial_shift else inner.shift
    shift = shift.expand(value.shape[1:]).clone()
    part = shift.narrow(dim - 1, begin, end - begin)
    if src.dim() == value.dim() and not bool((src == src[:1]).all()):
        raise Inexact("it writes another value for each of the batch")
    part.copy_((src[0] if src.dim() == value.dim() else src).expand(part.shape))
    return with_shift(inner, shift, space.tolerance(node))


def _unexpanded(node: Any) -> Any:
    """A constant as it was before it was expanded to a batch of dynamic size."""
    while isinstance(node, fx.Node) and node.target is aten.expand.default:
        node = named(node)["self"]
    return node


def joins_channels(space: Space, node: fx.Node) -> bool:
    """Does a concat join values along their channels?"""
    value, parts = node.meta["val"], named(node)["tensors"]
    return int(named(node).get("dim", 0)) % value.dim() == space.dim(value) and not any(part in space.fixed for part in parts)


def keeps_batch(space: Space, node: fx.Node) -> bool:
    """Does a slice take a part of the channels or places, and not of the batch?"""
    value = node.meta["val"]
    dim = int(named(node).get("dim", 0)) % value.dim()
    return dim == space.dim(value) or (dim > 1 and not space.channels_last)


def concat(space: Space, node: fx.Node, known: Known) -> Affine:
    """Values behind each other, along the channels."""
    return stack([known[one] for one in named(node)["tensors"]])


def part(space: Space, node: fx.Node, known: Known) -> Affine:
    """One result of a split, a chunk and the like along the channels."""
    parent, which = node.args
    assert isinstance(parent, fx.Node)
    whole = known[named(parent)["self"]]
    return select(whole, _indices(space, parent)[which])


def indexed(space: Space, node: fx.Node, known: Known) -> Affine:
    """index_select, and x[:, [..]], along the channels."""
    inner, value = known[named(node)["self"]], named(node)["self"].meta["val"]
    if op_name(node) == "index_select":
        dim, index = int(named(node)["dim"]) % value.dim(), named(node)["index"]
    else:
        given = [(d, i) for d, i in enumerate(named(node)["indices"]) if i is not None]
        if len(given) != 1:
            raise Inexact("it picks along several dimensions")
        (dim, index), = given
    rows = space.constant(index)
    if dim != space.dim(value) or rows is None or rows.dim() != 1 or index.meta["val"].dtype == torch.bool:
        raise Inexact("it picks along another dimension than the channels")
    return select(inner, rows.long() % inner.outputs)


def _indices(space: Space, node: fx.Node) -> Any:
    """What an op that only picks channels does to their numbers."""
    value = named(node)["self"].meta["val"]
    if int(named(node).get("dim", 0)) % value.dim() != space.dim(value):
        raise Inexact("it splits another dimension than the channels")
    op: Any = node.target
    return op(**{**named(node), "self": torch.arange(value.shape[space.dim(value)]), "dim": 0})
