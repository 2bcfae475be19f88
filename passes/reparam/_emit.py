"""An affine map as nodes of a graph: a scale, a linear, or a conv with its padding; what that will cost, before any kernel is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.cost import Cost, conv_cost, elementwise_cost, size
from sparsify_compiler.fold import put
from sparsify_compiler.passes.reparam._affine import Affine
from sparsify_compiler.passes.reparam._kernels import frame
from sparsify_compiler.passes.reparam._lattice import Lattice
from sparsify_compiler.program import Region

aten = torch.ops.aten
_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_WIDER = 2  # taps that a kernel may grow by in one dimension, so that the conv pads both sides alike and no pad has to be run before it


@dataclass(frozen=True)
class Emission:
    """How a map will be written: "scale", "linear" or "conv"; a conv's lattices may have grown, and `pads` are run before it where not None."""

    affine: Affine
    kind: str
    lattices: tuple[Lattice, ...]
    padding: tuple[int, ...]
    pads: tuple[tuple[int, int], ...] | None
    cost: Cost

    @property
    def nodes(self) -> int:
        """How many ops will run."""
        return 1 + (self.pads is not None) + self.affine.spatial_shift + (self.kind == "scale" and self.affine.spatial_shift)


def emission(affine: Affine, source: Tensor, out: Tensor) -> Emission:
    """The cheapest way to write a map from one value to another, both given by their fake tensors."""
    cost = elementwise_cost(size(out) + affine.shift.numel(), size(out), out.element_size()) if affine.spatial_shift else Cost()
    if affine.diagonal:
        return Emission(affine, "scale", (), (), None, cost + elementwise_cost(size(source), size(out), out.element_size(), 2))
    if not affine.lattices:
        weight = SimpleNamespace(shape=(affine.outputs, affine.channels))
        return Emission(affine, "linear", (), (), None, cost + conv_cost(source, weight, out))
    fitted = [_symmetric(one, places) for one, places in zip(affine.lattices, affine.places, strict=True)]
    if all(one is not None for one in fitted):
        lattices = tuple(one[0] for one in fitted if one is not None)
        conv = conv_cost(source, SimpleNamespace(shape=(*affine.kernel_shape[:2], *[one.size for one in lattices])), out)
        return Emission(affine, "conv", lattices, tuple(one[1] for one in fitted if one is not None), None, cost + conv)
    pads = tuple(one.pads for one in affine.lattices)
    padded = SimpleNamespace(shape=(*source.shape[:2], *[n + sum(pad) for n, pad in zip(source.shape[2:], pads, strict=True)]))
    cost += elementwise_cost(size(source), size(padded), out.element_size()) + conv_cost(padded, SimpleNamespace(shape=affine.kernel_shape), out)
    return Emission(affine, "conv", affine.lattices, (0,) * len(pads), pads, cost)


def write(plan: Emission, region: Region, source: fx.Node, target: fx.Node, made_of: Sequence[fx.Node], by: str, place: fx.Node,
          mask: Callable[[Tensor], fx.Node | None]) -> fx.Node:
    """Write the map's nodes before `target`, which they are to replace. Returns the node with its value; the source itself for y = x."""
    writer = _Writer(region, target, made_of, by, place)
    affine, dtype = plan.affine, target.meta["val"].dtype
    bias = affine.shift if not affine.spatial_shift and bool(affine.shift.any()) else None
    if plan.kind == "scale":
        result = _write_scale(writer, affine, source, dtype, bias)
    else:
        kernel = affine.kernel if plan.kind == "linear" else frame(affine.kernel, affine.lattices, plan.lattices)
        if plan.pads is not None:
            flat = [pad for pair in reversed(plan.pads) for pad in pair]
            source = writer.call(aten.pad.default, {"self": source, "pad": flat})
        weight = kernel.to(dtype).contiguous()
        named = {"input": source, "weight": writer.tensor("weight", weight, mask(weight))}
        named |= {"bias": writer.tensor("bias", bias.to(dtype))} if bias is not None else {}
        op = aten.linear.default if plan.kind == "linear" else _CONVS[len(plan.lattices) - 1]
        result = writer.call(op, named | _options(plan))
    if affine.spatial_shift:
        result = writer.call(aten.add.Tensor, {"self": result, "other": writer.tensor("shift", affine.shift.to(dtype)[None].contiguous())})
    return result


def _write_scale(writer: _Writer, affine: Affine, source: fx.Node, dtype: torch.dtype, bias: Tensor | None) -> fx.Node:
    value = source.meta["val"]
    factor = affine.kernel.reshape(-1)
    shape = [-1, *[1] * (value.dim() - 2)] if affine.lattices else [-1]
    if bias is not None:
        named = {"tensor1": source, "tensor2": writer.tensor("weight", factor.to(dtype).reshape(shape))}
        return writer.call(aten.addcmul.default, {"self": writer.tensor("bias", bias.to(dtype).reshape(shape)), **named})
    if bool((factor == 1).all()):
        return source
    return writer.call(aten.mul.Tensor, {"self": source, "other": writer.tensor("weight", factor.to(dtype).reshape(shape))})


def _options(plan: Emission) -> dict[str, Any]:
    """A conv's arguments that differ from their defaults; none of a linear."""
    if plan.kind == "linear":
        return {}
    given = {"stride": [one.stride for one in plan.lattices], "padding": list(plan.padding), "dilation": [one.step for one in plan.lattices],
             "groups": plan.affine.groups}
    usual = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return {name: value for name, value in given.items() if value != usual[name] and value != [usual[name]] * len(plan.lattices)}


@dataclass(frozen=True)
class _Writer:
    region: Region
    target: fx.Node
    made_of: Iterable[fx.Node]
    by: str
    place: fx.Node

    def tensor(self, argument: str, value: Tensor, mask: fx.Node | None = None) -> fx.Node:
        return put(self.region, self.target, value, argument, self.made_of, self.place.meta, self.by, mask)

    def call(self, op: Any, named: dict[str, Any]) -> fx.Node:
        with self.region.graph.inserting_before(self.target):
            node = self.region.graph.call_function(op, (), named)
        value = self.target.meta["val"]
        if op is aten.pad.default:  # all others already have the target's shape
            with torch.no_grad(), value.fake_mode:
                value = op(**fx.map_arg(named, lambda n: n.meta["val"]))
        node.meta = {k: self.place.meta[k] for k in ("path", "module") if k in self.place.meta} | {"by": self.by, "val": value}
        return node


def _symmetric(one: Lattice, places: int | None) -> tuple[Lattice, int] | None:
    """The lattice, with as few more taps as it takes, for which a conv that pads both sides alike gives the same outputs; and that padding."""
    best: tuple[Lattice, int] | None = None
    for padding in range(max(0, -one.start), max(0, -one.start) + _WIDER * one.step + 1):
        grown = one.start + padding
        step = one.step if one.size > 1 else math.gcd(grown, one.step) or 1
        if grown % step:
            continue
        for span in _spans(one, padding, places):
            if span >= grown + one.end - one.start and span % step == 0 and span // step + 1 <= one.size + _WIDER:
                found = replace(one, start=-padding, step=step, size=span // step + 1)
                best = (found, padding) if best is None or found.size < best[0].size else best
                break
    return best


def _spans(one: Lattice, padding: int, places: int | None) -> list[int]:
    """Distances of the last tap from the first for which a conv with this padding has as many outputs as the map."""
    if places is None:
        return [2 * padding - 1 - one.reach]
    wanted = one.outputs(places)
    return [span for span in range(places + 2 * padding) if (places + 2 * padding - span - 1) // one.stride + 1 == wanted]

