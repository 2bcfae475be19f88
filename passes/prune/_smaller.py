"""Around the removal of channels: mending the layers that read what goes, and the rows of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.axis import Atom
from sparsify_compiler.axis_follow import Follow
from sparsify_compiler.channel_groups import Group
from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import ModelError
from sparsify_compiler.named import Named
from sparsify_compiler.passes.prune._apply import add_bias, sources_of
from sparsify_compiler.passes.prune._layers import BASIC, Layer, find_layers
from sparsify_compiler.passes.prune._units import Units
from sparsify_compiler.passes.prune._visits import OF_LINEAR, DenseStatistics, DenseVisits, SweptVisits, Visits, summed
from sparsify_compiler.passes.prune.repairs._base import Cut, Repaired
from sparsify_compiler.passes.prune.structures.columns import Columns
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, get_tensor, set_tensor
from sparsify_compiler.sites import find_sites
from sparsify_compiler.sweep_gather import patches_of


def mend_readers(program: Program, found: Follow, groups: Sequence[Group], masks: Mapping[Atom, Tensor], repair: Named, inputs: str,
                 ctx: Context) -> None:
    """Put mended weights, zero where inputs go, into the linears and convolutions that read these groups; the cut itself comes after."""
    if repair.name == "none":
        return
    readers = _readers(groups, ctx)
    known, left = find_layers(program, ("*",), ())
    for one in left:
        if one.use.op in readers:
            ctx.miss(f"not mended: {one.reason}", one.use.site.path)
    layers = [layer for layer in known if all(use.op in readers for use in layer.uses)]
    visits = _visits(program, layers, repair, inputs, ctx)
    done = 0
    for group in visits.groups(program, layers):
        visits.enter(group)
        for layer in group:
            weight = _mended(layer, found, masks, repair, visits, ctx)
            visits.leave(sources_of(layer), weight)
            done += 1
            ctx.progress("mend readers", done, len(layers))


def _readers(groups: Sequence[Group], ctx: Context) -> set[fx.Node]:
    readers: set[fx.Node] = set()
    for group in groups:
        if group.exact:
            readers.update(op for member in group.members for op in member.reads)
        else:
            ctx.miss("its readers are not mended: a norm sees fewer features, so that zeros in their place are not the same", group.path)
    return readers


def _visits(program: Program, layers: Sequence[Layer], repair: Named, inputs: str, ctx: Context) -> Visits:
    if inputs != "dense":
        return SweptVisits(program, ctx.batches, inputs == "block", repair.statistics, DenseStatistics(ctx, program, {}))
    names = frozenset(OF_LINEAR.get(name, name) for name in repair.statistics)
    return DenseVisits(DenseStatistics(ctx, program, {use.site.path: names for layer in layers for use in layer.uses}))


def _mended(layer: Layer, found: Follow, masks: Mapping[Atom, Tensor], repair: Named, visits: Visits, ctx: Context) -> Tensor:
    """Store the mended weight (and bias) of one layer in all its uses. Returns the weight."""
    weight = layer.weight.detach()
    source: Any = layer.uses[0].op.kwargs["weight"]
    columns = found.axes.kept(found.values[source][1], masks).to(weight.device)
    mask = columns.reshape(-1, *(1,) * (weight.dim() - 2)).expand(weight.shape).contiguous()
    if not all(patches_of(use.op) is not None for use in layer.uses):
        ctx.miss(f"the repair {repair.name} does not know this kind of convolution: its values stay", layer.path)
        return weight * mask
    flat = weight.reshape(weight.shape[0], -1).to(torch.promote_types(weight.dtype, torch.float32))
    cut = Cut(flat, mask.reshape(flat.shape), Columns(), float(columns.double().mean()), summed(visits, layer, repair.statistics))
    mended: Repaired = repair(cut)
    if not bool(mended.weight.isfinite().all()):
        raise ModelError(f"the repair {repair.name} gave NaN or infinity", where=layer.path, hint="raise its damping, or give more batches")
    if mended.note:
        ctx.miss(mended.note, layer.path)
    new = mended.weight.to(weight.dtype).reshape(weight.shape)
    for node in sources_of(layer):
        region = next(use.region for use in layer.uses if use.op.kwargs["weight"] is node)
        old = get_tensor(region.module, str(node.target))
        shared = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        set_tensor(region.module, str(node.target), shared)
    if mended.bias is not None:
        _add_biases(layer, found, mended.bias.to(weight.dtype))
    return new


def _add_biases(layer: Layer, found: Follow, change: Tensor) -> None:
    made: dict[Any, fx.Node] = {}
    for use in layer.uses:
        source, old = use.op.kwargs["weight"], use.op.kwargs.get("bias")
        assert isinstance(source, fx.Node)
        if (use.region.path, old) not in made:
            made[use.region.path, old] = node = add_bias(use, source, change, "remove_channels")
            found.values[node] = (found.values[source][0],)
        use.op.kwargs = {**use.op.kwargs, "bias": made[use.region.path, old]}


def write_rows(program: Program, units: Units, groups: Sequence[Group], budget: float) -> Callable[[Program], None]:
    """Remember the layers that will shrink; the function that is returned writes their rows once they have."""
    before: dict[str, tuple[str, fx.Node, Tensor, list[str]]] = {}
    kinds = {(site.region, site.roles["op"]): site.kind for site in find_sites(program, BASIC)}
    for group in groups:
        for part in units.parts(group, "all"):
            kind, source = kinds.get((part.region.path, part.op.name)), part.op.kwargs["weight"]
            if kind is not None and isinstance(source, fx.Node):
                row = before.setdefault(part.site, (kind, part.op, source.meta["val"], []))
                row[3].append(group.kind)

    def write(after: Program) -> None:
        for site, (kind, op, old, names) in before.items():
            new = op.kwargs["weight"].meta["val"]  # type: ignore[union-attr]
            after.decisions[site] = Decision(site, kind, tuple(new.shape), str(new.dtype).removeprefix("torch."), density=new.numel() / old.numel(),
                                             budget=budget, dense_bytes=old.numel() * old.element_size(), bytes=new.numel() * new.element_size(),
                                             reason=f"smaller and dense: {' and '.join(dict.fromkeys(names))} removed, was {list(old.shape)}")

    return write
