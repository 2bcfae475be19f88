"""Multiply whole neurons, filters or features of the residual stream with a gate each, of which some are shut: what may be removed later on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx, nn

from sparsify_compiler.axis import Axis
from sparsify_compiler.axis_follow import Follow
from sparsify_compiler.channel_groups import Group, find_groups
from sparsify_compiler.errors import ParseError
from sparsify_compiler.passes.prune._gates import gate, put_gate
from sparsify_compiler.passes.prune._units import Units
from sparsify_compiler.passes.prune.remove_channels import RemoveChannels
from sparsify_compiler.passes.train.add_adapters import AddAdapters
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program
from sparsify_compiler.sites import find_sites


@dataclass(frozen=True)
class GateChannels(RemoveChannels):
    """Put a gate, one number a unit and one mask for all, behind everything that makes the units of a dependency group; the lowest scores are shut.

    Matches    linear(x, w, b), conv(x, w, b) and embedding(w, i) whose outputs are the units of a group (see sparsify_compiler/channel_groups.py)
    Rewrites   the same, times gate * mask: gate float, 1 at first, and mask bool, [1, units] (convolutions: [1, units, 1, 1]), shared by the group
    Preserves  signature; quality is measured
    Paper      PAT, Liu et al., arXiv:2408.14721: one trained mask for what all attentions and FFNs write

    adapter  a file of passes/train/adapters with its options, put between each linear layer that makes the units and the gate; all else is frozen
    score, budget, density, targets, ignore, sides, multiple   as in remove_channels, which would cut what is shut here

    learn_masks(of="gates") lets the choice be learnt. What is shut in the end drop_dead_channels() takes out, and fold_scale() folds the other gates
    into the weights. A group whose units do not lie side by side in what makes them (heads), or that both convolutions and linears make (the stream
    of a ViT), has no gates.
    """

    score: str = "magnitude"
    targets: tuple[str, ...] = ("neurons", "filters")
    adapter: str | None = None

    idempotent: ClassVar[bool] = False  # a second time puts gates behind gates

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter is not None:
            AddAdapters(self.adapter)
        if self.repair != "none" or self.inputs != "dense":
            raise ParseError("gates are trained, and nothing is mended behind them: leave out repair and inputs", where="gate_channels")

    def run(self, program: Program, ctx: Context) -> Program:
        density = self.density_of(ctx)
        groups = find_groups(program)
        chosen = [group for group in self._chosen(groups, program, ctx) if self._side_by_side(groups.found, group, ctx)]
        masks = self._masks(chosen, Units.of(program, groups.found), density, ctx) if chosen else {}
        for group in chosen:
            if ctx.spend():
                self._gate(groups.found, group, masks[group.path])
        made = {(member.region.path, op.name) for group in chosen for member in group.members for op in member.writes}
        sites = [site for site in find_sites(program, ("linear",)) if (site.region, site.roles["op"]) in made]
        paths = tuple(f"re:{re.escape(site.path)}" for site in sites)  # a layer may be called "linear", which selects all of them
        return AddAdapters(self.adapter, targets=paths).run(program, ctx) if self.adapter is not None and paths else program

    def _side_by_side(self, found: Follow, group: Group, ctx: Context) -> bool:
        made = [op for member in group.members for op in member.writes]
        dims = {op: _dim(found, group, op) for op in made}
        why = None
        if not made or None in dims.values():
            why = "do not lie side by side in what makes them"
        elif len({op.graph for op in made}) > 1:
            why = "are made in several graphs"
        elif len({op.meta["val"].dim() - dim for op, dim in dims.items() if dim is not None}) > 1:
            why = "are made as channels of images and as features: one gate has not the shape of both"
        if why is not None:
            ctx.miss(f"its {group.size} {group.kind} {why}", group.path)
        return why is None

    def _gate(self, found: Follow, group: Group, mask: Tensor) -> None:
        made = {op: _dim(found, group, op) for member in group.members for op in member.writes}
        region = next(member.region for member in group.members if member.writes)
        order = {node: i for i, node in enumerate(region.graph.nodes)}
        product: fx.Node | None = None
        for op, dim in sorted(made.items(), key=lambda item: order[item[0]]):
            value: Tensor = op.meta["val"]
            assert dim is not None
            trailing = value.dim() - 1 - dim
            if product is None:
                shaped = mask.reshape(1, -1, *(1,) * trailing).to(value.device)
                product = put_gate(region, op, group.path or group.kind, shaped, value.dtype, self.name())
            gate(op, product, self.name())


def _dim(found: Follow, group: Group, op: fx.Node) -> int | None:
    """The dimension of what an op gives that is this group's units, one beside the other; None where there is no such, or nothing in front of it."""
    dims: Sequence[Axis | None] = found.of(op)
    for dim, axis in enumerate(dims):
        if axis is not None and dim > 0 and list(found.axes.leaves(axis)) == [group.atom] and found.axes.size(axis) == group.size:
            return dim
    return None


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An FFN around which a stream goes, and a head."""
    from sparsify_compiler.passes.prune import remove_channels

    return remove_channels.example()
