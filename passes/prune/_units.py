"""What the units of a dependency group are worth, and what budgets are told about groups."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from sparsify_compiler.axis_follow import Follow
from sparsify_compiler.channel_groups import Group, Member
from sparsify_compiler.errors import CalibrationError, ModelError
from sparsify_compiler.fold import evaluate
from sparsify_compiler.named import Named
from sparsify_compiler.normal_form_edit import aten, is_call
from sparsify_compiler.passes_api import Statistics
from sparsify_compiler.program import Program, Region
from sparsify_compiler.site_block import find_blocks
from sparsify_compiler.sites import op_paths

Sides = Literal["readers", "writers", "all"]


@dataclass(frozen=True)
class Part:
    """An op whose weight units of a group lie in, and the path of its site."""

    region: Region
    op: fx.Node
    site: str


@dataclass(frozen=True)
class Units:
    """The groups of a Program as things to be scored.

    sites   (region, op) -> path of its site
    blocks  (region, op) -> name of the block that it lies in
    """

    found: Follow
    sites: Mapping[tuple[str, str], str]
    blocks: Mapping[tuple[str, str], str]

    @staticmethod
    def of(program: Program, found: Follow) -> Units:
        sites = op_paths(program, ("linear", "conv"))
        return Units(found, sites, {(block.region, op): block.path for block in find_blocks(program) for op in block.ops})

    def parts(self, group: Group, sides: Sides) -> list[Part]:
        """The ops on these sides of a group that are sites; those on the other side where there is none."""
        read = [(member.region, op) for member in group.members for op in member.reads]
        made = [(member.region, op) for member in group.members for op in member.writes]
        chosen = {"readers": read or made, "writers": made or read, "all": [*read, *made]}[sides]
        unique = {op: region for region, op in chosen}
        return [Part(region, op, self.sites.get((region.path, op.name), "")) for op, region in unique.items()]

    def in_each(self, group: Group) -> int:
        """How many weights one unit has."""
        return sum(self._width(member, group) * (member.tensor.numel() // member.tensor.shape[member.dim]) for member in group.members)

    def width(self, group: Group) -> int:
        """How many indices one unit has in the dimension where it has most: the width of a head."""
        return max(self._width(member, group) for member in group.members)

    def _width(self, member: Member, group: Group) -> int:
        return int((self.found.axes.units(member.axis, group.atom) == 0).sum())

    def score(self, group: Group, scored: Named, sides: Sides, statistics: Statistics | None, seed: int) -> Tensor:
        """float64 [units]: the mean score of the weights in each. Raises ModelError where that is not finite."""
        total, count = torch.zeros(group.size, dtype=torch.float64), torch.zeros(group.size, dtype=torch.float64)
        for part in self.parts(group, sides):
            if is_call(part.op, aten.embedding.default) and scored.statistics:
                continue  # nothing is gathered of what picks rows
            source = part.op.kwargs["weight"]
            assert isinstance(source, fx.Node)
            weight = evaluate(part.region, source)
            given = {name: statistic(statistics, part.site, name) for name in scored.statistics}
            each = scored(weight, given, zlib.crc32(f"{seed} {part.site}".encode())).double().cpu()
            for dim, axis in enumerate(self.found.values[source]):
                units = self.found.axes.units(axis or (), group.atom)
                if dim < 2 and bool((units >= 0).any()):
                    mine = each.movedim(dim, 0).flatten(1)[units >= 0]
                    total.index_add_(0, units[units >= 0], mine.sum(1))
                    count.index_add_(0, units[units >= 0], torch.full((len(mine),), float(mine.shape[1]), dtype=torch.float64))
        if not bool(total.isfinite().all()):
            raise ModelError("the score is NaN or infinite", where=group.path, hint="repair the checkpoint, check the calibration batches, or name "
                             "this group in ignore=")
        return total / count.clamp_min(1)


@dataclass(frozen=True)
class UnitEvidence:
    """budgets._base.Evidence about groups: of a group's first reader where a budget asks for a layer's weight or statistic."""

    units: Units
    groups: Mapping[str, Group]
    scores: Mapping[str, Tensor]
    statistics: Statistics | None

    def score(self, site: str) -> Tensor:
        return self.scores[site].float()[:, None].expand(-1, self.units.in_each(self.groups[site]))

    def weight(self, site: str) -> Tensor:
        part = self._part(site)
        source = part.op.kwargs["weight"]
        assert isinstance(source, fx.Node)
        return evaluate(part.region, source)

    def statistic(self, site: str, name: str) -> Tensor:
        return statistic(self.statistics, self._part(site).site, name)

    def block(self, site: str) -> str:
        part = self._part(site)
        return self.units.blocks.get((part.region.path, part.op.name), site)

    def _part(self, site: str) -> Part:
        return self.units.parts(self.groups[site], "readers")[0]


def statistic(found: Statistics | None, site: str, name: str) -> Tensor:
    """A statistic of the dense model. Raises CalibrationError where there is none."""
    if found is None:
        raise CalibrationError(f"the statistic {name} is needed and there is no calibration", where=site)
    return found.get(site, name)


def needed(units: Units, groups: Iterable[Group], sides: Sides, score: Iterable[str], budget: Iterable[str]) -> dict[str, frozenset[str]]:
    """Site -> statistics that scores and budgets ask for."""
    wanted: dict[str, frozenset[str]] = {}
    for group in groups:
        for part in units.parts(group, sides) if score else ():
            wanted[part.site] = wanted.get(part.site, frozenset()) | frozenset(score)
        for part in units.parts(group, "readers")[:1] if budget else ():
            wanted[part.site] = wanted.get(part.site, frozenset()) | frozenset(budget)
    return {site: names for site, names in wanted.items() if site}
