"""Split each FFN into the neurons that matter most and the rest, so that each part can be compressed in its own way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.channel_groups import Group, Groups, find_groups
from sparsify_compiler.errors import ParseError
from sparsify_compiler.fold import erase_dead, evaluate, is_constant, leaves, masks, put
from sparsify_compiler.named import Named
from sparsify_compiler.normal_form_edit import aten, infer, insert
from sparsify_compiler.passes.prune._units import Units, needed
from sparsify_compiler.passes.prune.structures._base import keep_top
from sparsify_compiler.passes.reparam._weights import tied
from sparsify_compiler.passes_api import Context, Miss, Pass
from sparsify_compiler.program import Program, Region, Site
from sparsify_compiler.sites import chosen_sites

PARTS = ("heavy", "rest")


@dataclass(frozen=True)
class SplitNeurons(Pass):
    """Write each FFN as the sum of two: the neurons that score highest, and all others.

    Matches    linear(act(linear(x, w1, b1)), w2, b2), also gated
    Rewrites   linear(act(linear(x, w1[heavy], b1[heavy])), w2[:, heavy], b2) + linear(act(linear(x, w1[rest], b1[rest])), w2[:, rest]); their
               module paths end with ".heavy" and ".rest", for the selectors of other passes
    Preserves  values, up to float reassociation
    Paper      Liu et al., FFSplit: Split Feed-Forward Network For Optimizing Accuracy-Efficiency Trade-off in Language Model Inference,
               arXiv:2401.04044, section 3

    share    of the neurons that is heavy, at least one and not all
    score    a file of passes/prune/scores, of the weights that read the neurons; the default's mean is the size of what a neuron adds
    targets  selectors of FFN sites; all by default
    ignore   selectors of FFN sites that stay as they are
    """

    share: float = 0.25
    score: str = "weight_times_input_norm"
    targets: tuple[str, ...] = ("ffn",)
    ignore: tuple[str, ...] = ()

    idempotent: ClassVar[bool] = False  # the parts are FFNs too

    def __post_init__(self) -> None:
        Named.parse("score", self.score)
        if not 0 < self.share < 1:
            raise ParseError(f"share lies between 0 and 1, got {self.share}", where="split_neurons")
        self.take_selectors("targets", "ignore")

    def needs(self, program: Program) -> Mapping[str, frozenset[str]]:
        names = Named.parse("score", self.score).statistics
        groups = find_groups(program) if names else None
        if groups is None:
            return {}
        own = [group for site in self._sites(program) if (group := _group(groups, program.regions[site.region], site)) is not None]
        return needed(Units.of(program, groups.found), own, "readers", names, ())

    def run(self, program: Program, ctx: Context) -> Program:
        sites = self.ffns(program, ctx)
        groups, scored = find_groups(program), Named.parse("score", self.score)
        units = Units.of(program, groups.found)
        for site in sites:
            region = program.regions[site.region]
            group = _group(groups, region, site)
            why = Miss("its neurons are coupled with others") if group is None else _unfit(region, site, group)
            if why is not None or group is None:
                ctx.miss(why.why if why else "", site.path)
            elif ctx.spend():
                score = units.score(group, scored, "readers", ctx.statistics, ctx.seed)
                count = min(max(1, round(self.share * group.size)), group.size - 1)
                _Split(region, site, keep_top(score[None], count)[0], self.name()).run()
        return program

    def _sites(self, program: Program) -> list[Site]:
        return chosen_sites(program, ("ffn",), self.targets, self.ignore)


def _group(groups: Groups, region: Region, site: Site) -> Group | None:
    """The group of an FFN's neurons, if nothing but the FFN makes or reads them."""
    nodes = {role: region.node(name) for role, name in site.roles.items()}
    own = {nodes[role] for role in ("up", "gate", "down") if role in nodes}
    for group in groups.groups:
        ops = {op for member in group.members for op in (*member.reads, *member.writes)}
        if group.kind == "neurons" and nodes["down"] in {op for member in group.members for op in member.reads}:
            return group if ops == own else None
    return None


def _unfit(region: Region, site: Site, group: Group) -> Miss | None:
    if site.facts.get("fused"):
        return Miss("gate and up are one linear")
    if group.size < 2:
        return Miss("it has one neuron")
    for role in ("up", "gate", "down"):
        node: Any = region.node(site.roles[role]) if role in site.roles else None
        if node is not None:
            if masks(region, node.kwargs["weight"]):
                return Miss(f"would dissolve the mask of its {role} projection")
            why = tied(region, node.kwargs["weight"], [node])
            if why is not None:
                return why
    between = _between(region, site)
    if any(is_constant(source) for node in between for source in node.all_input_nodes):
        return Miss("its activation has a parameter for each neuron")
    return None


def _between(region: Region, site: Site) -> list[fx.Node]:
    """The nodes between the projections, in graph order."""
    ends = {site.roles[role] for role in ("up", "gate") if role in site.roles}
    found, waiting = set[fx.Node](), [region.node(site.roles["down"]).kwargs["input"]]
    while waiting:
        node: Any = waiting.pop()
        if node.name not in ends and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return [node for node in region.graph.nodes if node in found]


@dataclass
class _Split:
    """Carries out the split of one FFN. heavy bool [neurons]."""

    region: Region
    site: Site
    heavy: Tensor
    by: str
    made: list[fx.Node] = field(default_factory=list)

    def run(self) -> None:
        down = self.region.node(self.site.roles["down"])
        between = _between(self.region, self.site)
        parts = [self._part(name, mask.nonzero()[:, 0], down, between) for name, mask in zip(PARTS, (self.heavy, ~self.heavy), strict=True)]
        total = insert(down, aten.add.Tensor, down.meta["val"], self=parts[0], other=parts[1])
        total.meta["by"] = self.by
        down.replace_all_uses_with(total)
        erase_dead([down])

    def _part(self, name: str, index: Tensor, down: fx.Node, between: list[fx.Node]) -> fx.Node:
        new: dict[fx.Node, fx.Node] = {}
        for role in ("up", "gate"):
            if role in self.site.roles:
                old = self.region.node(self.site.roles[role])
                new[old] = self._linear(name, old, down, old.kwargs["input"], index, 0, True)
        for node in between:
            new[node] = self.region.graph.node_copy(node, lambda n: new.get(n, n))
            down.prepend(new[node])
            new[node].meta = {**node.meta, "by": self.by, "val": infer(node.target, dict(new[node].kwargs))}
        return self._linear(name, down, down, new[down.kwargs["input"]], index, 1, name == PARTS[0])  # type: ignore[index]

    def _linear(self, name: str, old: Any, before: fx.Node, source: Any, index: Tensor, dim: int, biased: bool) -> fx.Node:
        place = {**old.meta, "path": f"{old.meta['path']}.{name}" if old.meta.get("path") else name}
        weight, bias = old.kwargs["weight"], old.kwargs.get("bias")
        kwargs = {"input": source, "weight": self._stored(before, weight, index, dim, "weight", place)}
        if bias is not None and biased:
            kwargs["bias"] = self._stored(before, bias, index, 0, "bias", place) if dim == 0 else bias
        new = insert(before, aten.linear.default, **kwargs)
        new.meta |= {"path": place["path"], "module": old.meta.get("module", ""), "by": self.by}
        return new

    def _stored(self, before: fx.Node, source: fx.Node, index: Tensor, dim: int, argument: str, place: Mapping[str, Any]) -> fx.Node:
        value = evaluate(self.region, source).index_select(dim, index)
        return put(self.region, before, value, argument, leaves(source), place, self.by)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An FFN of 16 neurons."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval(), (torch.randn(4, 8),)
