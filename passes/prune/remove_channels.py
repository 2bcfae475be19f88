"""Remove whole neurons, heads, filters or features of the residual stream: the weights become smaller, and stay dense."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sparsify_compiler.axis import Atom
from sparsify_compiler.channel_cut import cut_channels
from sparsify_compiler.channel_groups import KINDS, Group, Groups, find_groups
from sparsify_compiler.errors import BudgetError, ModelError, ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.passes.prune._smaller import mend_readers, write_rows
from sparsify_compiler.passes.prune._units import Sides, UnitEvidence, Units, needed
from sparsify_compiler.passes.prune.structures._base import keep_top
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program
from sparsify_compiler.selectors import select

DEFAULT = ("heads", "neurons", "filters")


@dataclass(frozen=True)
class RemoveChannels(Pass):
    """Remove the units of each dependency group that score lowest, with all that was made for them or of them, and mend what reads the rest.

    Matches    every dimension of a parameter that can shrink, with those that must shrink with it (see sparsify_compiler/channel_groups.py)
    Rewrites   linear(x, w, b), conv, norm, embedding and their like, with rows, columns and entries of w and b gone; sizes in reshapes likewise
    Preserves  signature; quality is measured
    Paper      none: the frame that Pruning Filters (arXiv:1608.08710), Are Sixteen Heads Really Better than One (arXiv:1905.10650), CFSP
               (arXiv:2409.13199) and SliceGPT (arXiv:2401.15024) fill in

    score     a file of passes/prune/scores; a unit is worth the mean of what its weights score
    budget    a file of passes/prune/budgets: how the density is shared out over the groups
    density   kept / total units of the selected groups, weighted with their weights; by default the user's budget
    targets   selectors of groups: "heads" (of grouped queries a head of k and v with all its queries; "copies" are the queries of each group),
              "neurons" between two linears, "filters" between convolutions, "stream" (what is summed around blocks), "embedding" (what
              a table gives, before anything is added), "head_dim" (within every head), or a group's module path
    ignore    selectors of groups that stay whole
    sides     whose weights are scored: of the "readers" of a group's units, their "writers", or "all"
    multiple  the width of what is left is a multiple of this, where there is that much of it
    repair    a file of passes/prune/repairs, which mends the linears and convolutions that read the group, before it is cut
    inputs    what reaches them then, as in mask_weights: "dense", "block" or "pruned"

    A group that cannot shrink (a model's inputs and outputs, what an op mixes that is not looked through, weights that are not floats) stays
    whole, and `sparsify why` tells the reason. Norms over features that go see fewer; where that is so, nothing is mended.
    """

    score: str = "weight_times_input_norm"
    budget: str = "uniform"
    density: float | None = None
    targets: tuple[str, ...] = DEFAULT
    ignore: tuple[str, ...] = ()
    sides: Sides = "readers"
    multiple: int = 1
    repair: str = "none"
    inputs: Literal["dense", "block", "pruned"] = "dense"

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    idempotent: ClassVar[bool] = False  # a second time cuts a share of what is left

    def __post_init__(self) -> None:
        for kind, name in (("score", self.score), ("budget", self.budget), ("repair", self.repair)):
            Named.parse(kind, name)
        for name, known in (("sides", ("readers", "writers", "all")), ("inputs", ("dense", "block", "pruned"))):
            if getattr(self, name) not in known:
                raise ParseError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}", where="remove_channels")
        if self.multiple < 1:
            raise ParseError(f"multiple is at least 1, got {self.multiple}", where="remove_channels")
        self.check_density(self.density)
        self.take_selectors("targets", "ignore")

    def needs(self, program: Program) -> Mapping[str, frozenset[str]]:
        """What scores and budgets ask of the dense model; a repair gathers its own."""
        score, budget = (Named.parse(kind, name).statistics for kind, name in (("score", self.score), ("budget", self.budget)))
        if not (score or budget):
            return {}
        groups = find_groups(program)
        return needed(Units.of(program, groups.found), self._chosen(groups, program, Context()), self.sides, score, budget)

    def run(self, program: Program, ctx: Context) -> Program:
        density = self.density_of(ctx)
        groups = find_groups(program)
        chosen = self._chosen(groups, program, ctx)
        units = Units.of(program, groups.found)
        masks = self._masks(chosen, units, density, ctx) if density < 1 else {}
        cut = {group.path: masks[group.path] for group in chosen if group.path in masks and not bool(masks[group.path].all()) and ctx.spend()}
        if not cut:
            return program
        gone = [group for group in chosen if group.path in cut]
        by_atom: dict[Atom, Tensor] = {group.atom: cut[group.path] for group in gone}
        mend_readers(program, groups.found, gone, by_atom, Named.parse("repair", self.repair), self.inputs, ctx)
        write = write_rows(program, units, gone, density)
        cut_channels(program, groups.found, by_atom, self.name())
        write(program)
        return program

    def _chosen(self, groups: Groups, program: Program, ctx: Context) -> list[Group]:
        """The groups that are to be cut. Raises SelectorError for a selector that matches none, ModelError where none can be cut."""
        kinds = {group.kind for group in groups.groups}
        targets = tuple(target for target in self.targets if target in kinds or target not in KINDS)
        found = select([group.site for group in groups.groups], targets, self.ignore, program) if targets else []
        wanted = {(site.kind, site.path) for site in found}
        named = [group for group in groups.groups if (group.kind, group.path) in wanted]
        for group in named:
            if group.fixed is not None:
                ctx.miss(f"its {group.size} {group.kind} stay: {group.fixed}", group.path)
        free = [group for group in named if group.fixed is None]
        if not free:
            reasons = "; ".join(dict.fromkeys(f"{group.path}: {group.fixed}" for group in (named or groups.groups) if group.fixed))
            raise ModelError(f"there is nothing to remove: no group of kind {', '.join(self.targets)} can shrink", where=self.name(),
                             hint=(reasons or f"kinds are {', '.join(KINDS)}")[:400])
        return free

    def _masks(self, chosen: Sequence[Group], units: Units, density: float, ctx: Context) -> dict[str, Tensor]:
        """Group -> bool [units], True for those that stay."""
        scored, shared = Named.parse("score", self.score), Named.parse("budget", self.budget)
        scores = {group.path: units.score(group, scored, self.sides, ctx.statistics, ctx.seed) for group in chosen}
        shapes = {group.path: (group.size, units.in_each(group)) for group in chosen}
        evidence = UnitEvidence(units, {group.path: group for group in chosen}, scores, ctx.statistics)
        densities: dict[str, float] = shared(shapes, density, evidence)
        masks = {}
        for group in chosen:
            if density * group.size < 0.5:
                raise BudgetError(f"a density of {density:g} leaves none of its {group.size} {group.kind}", where=f"{self.name()}, {group.path}",
                                  hint="raise the density, or name this group in ignore=")
            count = self._count(densities[group.path] * group.size, group.size, units.width(group))
            masks[group.path] = keep_top(scores[group.path][None], count)[0]
        return masks

    def _count(self, wanted: float, size: int, width: int) -> int:
        """A whole number of units, as near as can be, whose width is a multiple."""
        step = min(self.multiple // math.gcd(self.multiple, width), size)
        return min(size, max(step, math.floor(wanted / step + 0.5) * step))


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An FFN around which a stream goes, and a head."""
    torch.manual_seed(0)
    return _Block().eval(), (torch.randn(2, 8),)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x + self.down(nn.functional.gelu(self.up(x))))
        return y
