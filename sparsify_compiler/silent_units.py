"""Which units of a dependency group are zero in every value they are in, whatever the input: what made them is zero, or multiplied with zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .axis import Atom
from .axis_follow import Follow
from .axis_layout import LAYOUT_RULES
from .fold import constants, evaluate
from .normal_form_edit import aten, is_call
from .operands import CONVOLUTIONS
from .program import Region
from .site_graph import LAYOUT

_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_OF_ONE = (aten.relu.default, aten.gelu.default, aten.silu.default, aten.tanh.default, aten.leaky_relu.default, aten.neg.default, aten.abs.default,
           aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim,
           aten.sum.dim_IntList, *LAYOUT_RULES, *LAYOUT)  # 0 where all that they read is 0


def silent_units(region: Region, found: Follow, atom: Atom) -> dict[fx.Node, Tensor]:
    """Node -> bool [units]: which units of a group are 0 there. Of the nodes of one region whose value has a dimension with units in it."""
    silent: dict[fx.Node, Tensor] = {}
    fixed = constants(region.graph)
    for node in region.graph.nodes:
        dims = found.values.get(node)
        lists = dims if isinstance(dims, list) else [dims or ()]
        if any(axis is not None and atom in found.axes.leaves(axis) for part in lists for axis in part):
            stored = node in fixed and not isinstance(dims, list)  # of several, as a split gives, each is looked at where it is picked
            silent[node] = _silent(region, found, atom, node, silent, stored)
    return silent


def _silent(region: Region, found: Follow, atom: Atom, node: Any, silent: dict[fx.Node, Tensor], constant: bool) -> Tensor:
    nothing = torch.zeros(found.axes.sizes[atom], dtype=torch.bool)
    if constant:
        return _zeros(found, atom, node, evaluate(region, node))
    sources = [silent.get(source, nothing) for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor | list | tuple)]
    if is_call(node, aten.linear.default, aten.embedding.default, *CONVOLUTIONS):
        made = [source for name in ("weight", "bias") if isinstance(source := node.kwargs.get(name), fx.Node)]
        own = [silent[source] for source in made if source in silent and _writes(found, atom, node, source)]
        return torch.stack(own).all(0) if len(own) == len(made) else nothing
    if is_call(node, aten.mul.Tensor, aten.rms_norm.default):
        return torch.stack(sources).any(0)
    if is_call(node, aten.cat.default):  # of parts without units of this group nothing is asked
        return torch.stack([silent[source] for source in node.all_input_nodes if source in silent]).all(0)
    whole = is_call(node, *_OF_ONE) or (is_call(node, *_SUMS) and len(sources) == 2)  # rather than with a number
    return torch.stack(sources).all(0) if sources and whole else nothing


def _writes(found: Follow, atom: Atom, node: Any, source: fx.Node) -> bool:
    """Are the units those that this weight or bias makes, rather than those that it reads?"""
    dims = found.of(source)
    axis = dims[-1] if is_call(node, aten.embedding.default) else dims[0]
    return axis is not None and atom in found.axes.leaves(axis)


def _zeros(found: Follow, atom: Atom, node: fx.Node, value: Tensor) -> Tensor:
    """Which units are 0 in a stored value."""
    alive = torch.zeros(found.axes.sizes[atom], dtype=torch.bool)
    for dim, axis in enumerate(found.of(node)):
        units = found.axes.units(axis, atom) if axis is not None else torch.full((1,), -1)
        if bool((units >= 0).any()):
            used = (value != 0).movedim(dim, 0).reshape(len(units), -1).any(1).cpu()
            alive[units[used & (units >= 0)]] = True
    return ~alive
