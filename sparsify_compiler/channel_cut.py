"""Taking units out of a Program for real, or repeating them: smaller or larger parameters, and a graph whose sizes say so."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .axis import Atom, Axis
from .axis_follow import Dims, Follow, identity
from .axis_layout import PIECES, run_of
from .fakes import fake_like, fake_of, mode_of
from .fold import evaluate, leaves, put
from .normal_form_edit import argument, aten, insert, is_call
from .operands import CONVOLUTIONS
from .program import Program, Region, get_tensor, set_tensor


@dataclass
class Cut:
    """What goes, and what was made smaller so far.

    masks  leaf of the axes -> bool, True for the units that stay; or int64, how often each is there
    by     the pass that does it
    """

    found: Follow
    masks: Mapping[Atom, Tensor]
    by: str
    tensors: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)  # identity -> (before, after): while both live no address is used twice

    def touched(self, axis: Axis | None) -> bool:
        """Does anything of this axis go?"""
        return axis is not None and any(leaf in self.masks for leaf in self.found.axes.leaves(axis))

    def kept(self, axis: Axis) -> Tensor:
        """bool: which of its indices stay; or int64: how often each is there."""
        return self.found.axes.kept(axis, self.masks)

    def index(self, axis: Axis) -> Tensor:
        """int64 [size]: the index before the cut of each index behind it."""
        return self.found.axes.index(axis, self.masks)

    def size(self, axis: Axis) -> int:
        """How many of its indices stay."""
        return int(self.kept(axis).sum())


def cut_channels(program: Program, found: Follow, masks: Mapping[Atom, Tensor], by: str) -> None:
    """Take the units out of every parameter, buffer and size of the Program, in place; its tensors are replaced, never changed.

    found  what `follow` said of this very Program
    masks  atom of a group -> bool [units], True for those that stay, at least one of each; or int64 [units], how often each is there
    """
    cut = Cut(found, {atom: mask for atom, mask in masks.items() if bool((mask != 1).any())}, by)
    if not cut.masks:
        return
    for region in program.regions.values():
        for node in list(region.graph.nodes):
            if node.op == "get_attr":
                _shrink(cut, region, node)
            elif node.op == "call_function" and any(cut.touched(axis) for axis in _axes(found, node)):
                _rewrite(cut, region, node)
        _infer(region)


def _axes(found: Follow, node: fx.Node) -> list[Axis | None]:
    """All axes of what a node reads and gives."""
    every = []
    for one in (node, *node.all_input_nodes):
        dims = found.values.get(one)
        every += [axis for part in dims for axis in part] if isinstance(dims, list) else list(dims or ())
    return every


def _shrink(cut: Cut, region: Region, node: fx.Node) -> None:
    """A smaller tensor under the same name; one for all that are tied."""
    dims = cut.found.values[node]
    if not any(cut.touched(axis) for axis in dims):
        return
    old = get_tensor(region.module, str(node.target))
    key = identity(old)
    made = cut.tensors[key][1] if key in cut.tensors else None
    if made is None:
        if any(old is new for _, new in cut.tensors.values()):  # another node of the same name was here before
            node.meta |= {"val": fake_like(old, mode_of(region)), "by": cut.by}
            return
        with torch.inference_mode(False), torch.no_grad():
            made = old.detach()
            for dim, axis in enumerate(dims):
                if cut.touched(axis):
                    made = made.index_select(dim, cut.index(axis).to(made.device))
        made = nn.Parameter(made, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else made
        cut.tensors[key] = old, made
    set_tensor(region.module, str(node.target), made)
    node.meta |= {"val": fake_like(made, mode_of(region)), "by": cut.by}


def _rewrite(cut: Cut, region: Region, node: Any) -> None:
    """Bring the sizes that a call has as numbers to what they are now."""
    rewrite = _REWRITES.get(node.target)
    if rewrite is not None:
        rewrite(cut, region, node)
        node.meta["by"] = cut.by


def _set(node: Any, **kwargs: Any) -> None:
    node.kwargs = {**node.kwargs, **kwargs}


def _sizes(name: str) -> Callable[[Cut, Region, Any], None]:
    """The argument that gives the size of each dimension of the result; -1 and dynamic ones stay."""

    def rewrite(cut: Cut, region: Region, node: Any) -> None:
        dims, sizes = cut.found.values[node], list(node.kwargs[name])
        first = node.kwargs["dim"] % len(cut.found.values[node.kwargs["self"]]) if node.target is aten.unflatten.int else 0
        for i, size in enumerate(sizes):
            axis = dims[first + i]
            if isinstance(size, int) and size != -1 and axis is not None:
                sizes[i] = cut.size(axis)
        _set(node, **{name: sizes})

    return rewrite


def _run(cut: Cut, region: Region, node: Any) -> None:
    """slice, narrow."""
    dim = argument(node, "dim")
    axis = cut.found.values[node.kwargs["self"]][dim]
    bounds = run_of(node, cut.found.axes.size(axis)) if axis is not None else None
    if bounds is None:
        return
    kept = cut.kept(axis)
    start, stop = int(kept[: bounds[0]].sum()), int(kept[: bounds[1]].sum())
    if is_call(node, aten.narrow.default):
        _set(node, start=start, length=stop - start)
    else:
        order = [a.name for a in node.target._schema.arguments]
        kwargs = {**node.kwargs, "start": start, "end": stop}
        node.kwargs = {name: kwargs[name] for name in order if name in kwargs}


def _pieces(cut: Cut, region: Region, node: Any) -> None:
    """split, chunk: pieces of the sizes that they have now."""
    dim = argument(node, "dim")
    sizes = [cut.size(part[dim]) for part in cut.found.values[node]]
    node.target = aten.split_with_sizes.default
    node.kwargs = {"self": node.kwargs["self"], "split_sizes": sizes, "dim": dim}


def _groups(cut: Cut, region: Region, node: Any) -> None:
    """A convolution in groups has as many as are left: the input's channels by those that one filter reads."""
    if argument(node, "groups") != 1:
        weight = cut.found.values[node.kwargs["weight"]]
        channel = len(cut.found.values[node]) - len(weight) + 1
        _set(node, groups=cut.size(cut.found.values[node.kwargs["input"]][channel]) // cut.size(weight[1]))


def _normed(cut: Cut, region: Region, node: Any) -> None:
    """A norm over other features. An rms_norm of fewer still divides by the root of the sum over as many as there were: what went is zero."""
    shape = node.kwargs["normalized_shape"]
    dims = cut.found.values[node][-len(shape):]
    sizes = [cut.size(axis) for axis in dims]
    share = math.prod(shape) / math.prod(sizes)
    _set(node, normalized_shape=sizes)
    if is_call(node, aten.rms_norm.default) and share > 1:
        weight, dtype = node.kwargs.get("weight"), node.meta["val"].dtype
        eps = argument(node, "eps")
        old = torch.ones(sizes, dtype=dtype, device=node.meta["val"].device) if weight is None else evaluate(region, weight)
        new = put(region, node, old * math.sqrt(share), "weight", [] if weight is None else leaves(weight), node.meta, cut.by)
        kwargs = {**node.kwargs, "weight": new, "eps": (torch.finfo(dtype).eps if eps is None else eps) * share}
        node.kwargs = {a.name: kwargs[a.name] for a in node.target._schema.arguments if a.name in kwargs}


def _attention(cut: Cut, region: Region, node: Any) -> None:
    """Scores keep their scale where heads become narrower, and a mask for each head loses the heads that go."""
    dims = cut.found.values[node.kwargs["query"]]
    if cut.touched(dims[-1]) and argument(node, "scale") is None:
        _set(node, scale=1 / math.sqrt(cut.found.axes.size(dims[-1])))
    mask = node.kwargs.get("attn_mask")
    own: Dims = cut.found.values.get(mask, ()) if isinstance(mask, fx.Node) else ()
    if len(dims) > 2 and cut.touched(dims[-3]) and len(own) > 2 and own[-3] is not None and cut.found.axes.size(own[-3]) > 1:
        name, number = "kept_heads", 1
        while hasattr(region.module, f"{name}_{number}"):
            number += 1
        index = cut.index(dims[-3])
        set_tensor(region.module, f"{name}_{number}", index)
        with region.graph.inserting_before(node):
            kept = region.graph.get_attr(f"{name}_{number}")
        kept.meta = {"val": fake_like(index, mode_of(region)), "by": cut.by} | {k: node.meta[k] for k in ("path", "module") if k in node.meta}
        _set(node, attn_mask=insert(node, aten.index_select.default, self=mask, dim=len(own) - 3, index=kept))
        node.kwargs["attn_mask"].meta["by"] = cut.by


def _repeats(cut: Cut, region: Region, node: Any) -> None:
    dim = node.kwargs["dim"]
    given = cut.size(cut.found.values[node.kwargs["self"]][dim])
    _set(node, repeats=cut.size(cut.found.values[node][dim]) // given)


def _infer(region: Region) -> None:
    """Shapes anew."""
    mode = mode_of(region)
    with torch.no_grad(), mode:
        for node in region.graph.nodes:
            if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor | list | tuple):
                node.meta["val"] = node.target(*fx.map_arg(node.args, lambda n: fake_of(region, n, mode)),
                                               **fx.map_arg(node.kwargs, lambda n: fake_of(region, n, mode)))


_REWRITES: Mapping[Any, Callable[[Cut, Region, Any], None]] = {
    aten.reshape.default: _sizes("shape"),
    aten.unflatten.int: _sizes("sizes"),
    aten.expand.default: _sizes("size"),
    **dict.fromkeys((aten.slice.Tensor, aten.narrow.default), _run),
    **dict.fromkeys(PIECES, _pieces),
    **dict.fromkeys(CONVOLUTIONS, _groups),
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), _normed),
    aten.scaled_dot_product_attention.default: _attention,
    aten.repeat_interleave.self_int: _repeats,
}
