"""Drop the channels that nothing reads any more: what a mask over whole columns cut becomes smaller for real."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.axis_follow import Follow
from sparsify_compiler.channel_cut import cut_channels
from sparsify_compiler.channel_groups import Group, find_groups
from sparsify_compiler.fold import erase_dead, evaluate, is_mask_product
from sparsify_compiler.normal_form_edit import aten, is_call
from sparsify_compiler.passes.prune._smaller import write_rows
from sparsify_compiler.passes.prune._units import Units
from sparsify_compiler.passes_api import Context, Pass
from sparsify_compiler.program import Program, Region, get_tensor
from sparsify_compiler.silent_units import silent_units


@dataclass(frozen=True)
class DropDeadChannels(Pass):
    """Drop every unit of a dependency group (neuron, head, filter) whose weights are zero in all linears and convolutions that read it.

    Matches    linear(f(linear(x, w1, b1)), w2, b2) and conv(f(conv(x, w1, b1)), w2, b2), columns of w2 zero; f any ops that keep channels apart.
               Or what these columns read is zero: rows of w1 and b1, or of a gate behind them, and f(0) = 0
    Rewrites   the same with those columns of w2, rows of w1, entries of b1 and of the norms between gone; a mask that keeps all then goes too
    Preserves  values, up to float reassociation
    Paper      none: what every structured mask needs to pay, as in CFSP, arXiv:2409.13199

    One unit stays of a group that is dead altogether. Groups over whose units a norm goes are left alone, which would see fewer features; but an
    rms_norm of units that are zero is the same over the others.
    `sparsify why drop_dead_channels model` tells of every group that cannot shrink the reason.
    """

    def run(self, program: Program, ctx: Context) -> Program:
        groups = find_groups(program)
        masks: dict[str, Tensor] = {}
        for group in groups.groups:
            alive = _alive(groups.found, group) if group.fixed is None and any(member.reads for member in group.members) else None
            if alive is not None and not bool(alive.all()) and group.size > 1 and ctx.spend():
                masks[group.path] = alive
            elif alive is None or not group.exact:
                reason = group.fixed or "a norm goes over them, or nothing reads them"
                ctx.miss(f"its {group.size} {group.kind} stay: {reason}", group.path)
        gone = [group for group in groups.groups if group.path in masks]
        if not gone:
            ctx.miss("no channel is dead")
            return program
        write = write_rows(program, Units.of(program, groups.found), gone, 1.0)
        cut_channels(program, groups.found, {group.atom: masks[group.path] for group in gone}, self.name())
        write(program)
        for region in program.regions.values():
            _drop_full_masks(region)
        return program


def _alive(found: Follow, group: Group) -> Tensor:
    """bool [units]: which are read with a weight that is not zero where they are not zero; the first one at least."""
    alive = torch.zeros(group.size, dtype=torch.bool)
    silent: dict[fx.Node, Tensor] = {}
    for region in {member.region.path: member.region for member in group.members}.values():
        silent |= silent_units(region, found, group.atom)
    for member in group.members:
        for op in member.reads:
            source = op.kwargs["weight"]
            assert isinstance(source, fx.Node)
            weight = evaluate(member.region, source)
            units = found.axes.units(found.values[source][1] or (), group.atom)
            used = (weight != 0).movedim(1, 0).flatten(1).any(1).cpu() & (units >= 0)
            read = torch.zeros(group.size, dtype=torch.bool)
            read[units[used]] = True
            alive |= read & ~silent.get(op.kwargs["input"], torch.zeros_like(read))  # type: ignore[arg-type]
    for kind, axis, _, node in found.marks if not group.exact else ():
        if kind == "normed" and group.atom in found.axes.leaves(axis):
            given = silent.get(node.kwargs["input"]) if is_call(node, aten.rms_norm.default) else None  # the mean of a layer_norm would be of fewer
            alive |= torch.ones_like(alive) if given is None else ~given
    if not bool(alive.any()):
        alive[0] = True
    return alive


def _drop_full_masks(region: Region) -> None:
    """weight * mask becomes the weight where the mask keeps all."""
    for node in list(region.graph.nodes):
        if node._erased or not is_mask_product(region, node):
            continue
        weight, mask = node.kwargs["self"], node.kwargs["other"]
        fits = isinstance(mask, fx.Node) and mask.op == "get_attr" and weight.meta["val"].shape == mask.meta["val"].shape
        if fits and bool(get_tensor(region.module, str(mask.target)).all()):
            node.replace_all_uses_with(weight)
            erase_dead([node])


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An FFN whose second linear does not read every third hidden channel."""
    torch.manual_seed(0)
    up, down = nn.Linear(8, 12), nn.Linear(12, 4)
    with torch.no_grad():
        down.weight[:, ::3] = 0
    return nn.Sequential(up, nn.GELU(), down).eval(), (torch.randn(2, 8),)
