"""Any region of linear, shift-invariant ops becomes as few convs and linears as pay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.cost import node_cost
from sparsify_compiler.decision import Decision
from sparsify_compiler.fold import erase_dead, holding, leaves, masks
from sparsify_compiler.passes.reparam._emit import write
from sparsify_compiler.passes.reparam._maps import why_not
from sparsify_compiler.passes.reparam._search import Collapse as Edge
from sparsify_compiler.passes.reparam._search import Component, components
from sparsify_compiler.passes.reparam._space import Space
from sparsify_compiler.passes.reparam._sums import regroup_sums
from sparsify_compiler.passes_api import Context, Miss, Pass, Preserves
from sparsify_compiler.program import Program, Region


@dataclass(frozen=True)
class Collapse(Pass):
    """Collapse every subgraph whose ops are all linear and shift-invariant into its one equivalent conv, linear or scale, where that pays.

    Matches    values that depend on one other value through conv, linear, batch_norm with stored statistics, avg_pool, add, sub, mul and div by
               constants, neg, pad, slice, split, index, cat: in any arrangement, with any strides, dilations and groups
    Rewrites   y[o, i] = shift[o] + sum over c, j of kernel[o, c, j] * x[c, stride * i + start + step * j]: one conv (or linear, or scale),
               kernel and shift by algebra in float64; where zeros are padded behind a shift, the shift becomes a map over places
    Preserves  values, up to float reassociation
    Paper      none: general linear algebra; the rules of RepVGG (arXiv:2101.03697), ACNet (arXiv:1908.03930), DBB (arXiv:2103.13425), RepLKNet
               (arXiv:2203.06717), MobileOne (arXiv:2206.04040) and FastViT (arXiv:2303.14189) are cases of it

    A collapse that would raise FLOPs or bytes (a low-rank chain, a depthwise conv before a pointwise one) is left alone, and says both numbers.
    Among those that do not, the cheapest set is chosen by dynamic programming over the values that remain computed.
    """

    preserves: ClassVar[Preserves] = Preserves.VALUES

    def run(self, program: Program, ctx: Context) -> Program:
        for region in program.regions.values():
            for channels_last in (False, True):
                misses: list[Miss] = []
                while self._collapse_all(region, channels_last, program, ctx, misses):  # what is merged may make more worth merging
                    misses.clear()
                for miss in misses:
                    ctx.miss(miss.why, miss.at)
            for node in region.graph.nodes:
                if (reason := why_not(Space.of(region, False), node)) is not None:
                    ctx.miss(reason, region.qualified(node.name))
        return program

    def _collapse_all(self, region: Region, channels_last: bool, program: Program, ctx: Context, misses: list[Miss]) -> bool:
        """One round over the region. True when it changed."""
        regroup_sums(Space.of(region, channels_last), self.name())
        space, before = Space.of(region, channels_last), ctx.rewrites
        for component in components(space):
            self._collapse(component, program, ctx, misses)
        return ctx.rewrites > before

    def _collapse(self, component: Component, program: Program, ctx: Context, misses: list[Miss]) -> None:
        space, region = component.space, component.space.region
        way = component.solve()
        now: dict[fx.Node, fx.Node] = {}  # value that was replaced -> the one in its place
        misses += [Miss(reason, _place(region, at)) for reason, at in component.misses(way)]
        for target in sorted(way, key=component.order.__getitem__):
            edge = way[target]
            if edge is None:
                continue
            dissolved = self._dissolved(edge, space)
            if dissolved is not None:
                misses.append(Miss(f"{edge.what} as one {edge.plan.kind} would dissolve the mask {dissolved.target}", _place(region, target)))
            elif ctx.spend():
                now[target] = self._write(edge, now.get(edge.source, edge.source), space, program)
        erase_dead(reversed(component.ops))
        space.memo.clear()  # float64 copies of weights

    def _dissolved(self, edge: Edge, space: Space) -> fx.Node | None:
        """A mask among the weights that the new one would not keep."""
        above = [mask for one in _constants(edge, space) for mask in masks(space.region, one)]
        keeps = edge.plan.kind != "scale" and edge.plan.lattices == edge.plan.affine.lattices
        kept = bool(above) and keeps and holding(space.region, above, edge.plan.affine.kernel) is not None
        return above[0] if above and not kept else None

    def _write(self, edge: Edge, source: fx.Node, space: Space, program: Program) -> fx.Node:
        region = space.region
        place = max(edge.dying, key=lambda node: (node_cost(node).flops, -edge.dying.index(node)))
        constants = _constants(edge, space)
        made_of = [leaf for one in constants for leaf in leaves(one)]
        above = [mask for one in constants for mask in masks(region, one)]
        made = write(edge.plan, region, source, edge.target, made_of, self.name(), place, lambda weight: holding(region, above, weight))
        edge.target.replace_all_uses_with(made)
        if made is not source:
            _say(edge, made, place, region, program)
        return made


def _place(region: Region, node: fx.Node) -> str:
    path = str(node.meta.get("path", ""))
    return f"{region.qualified(node.name)} ({path})" if path else region.qualified(node.name)


def _constants(edge: Edge, space: Space) -> list[fx.Node]:
    """What the merged ops read beside the values of the region."""
    return [one for node in edge.dying for one in node.all_input_nodes if one in space.fixed]


def _say(edge: Edge, made: fx.Node, place: fx.Node, region: Region, program: Program) -> None:
    """A row of the report: what became one op, and what that saves."""
    path = str(place.meta.get("path") or region.qualified(made.name))
    site = path if path not in program.decisions else f"{path} ({edge.target.name})"
    made.meta["site"] = site
    weight = made.kwargs.get("weight")
    shape = tuple(int(s) for s in weight.meta["val"].shape) if isinstance(weight, fx.Node) else ()
    before, after = edge.before, edge.plan.cost
    value: Tensor = made.meta["val"]
    program.decisions[site] = Decision(site, edge.plan.kind, shape, str(value.dtype).removeprefix("torch."), merged=len(edge.dying),
                                       flops_before=before.flops, flops=after.flops, moved_before=before.bytes, moved=after.bytes)


class _Block(nn.Module):
    """Branches that no rule names: an upright kernel and a square one under a norm, a pool behind a conv, a scaled skip, joined by scaled sums."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.tall = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, (5, 1), padding=(2, 0))
        self.point, self.norm = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.gamma = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.avg_pool2d(self.point(x), 3, 1, 1)
        return torch.relu(self.norm(self.large(x) + self.tall(x)) + (pooled - 0.5 * x) * self.gamma)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Four branches of one input, which become one 5x3 conv."""
    torch.manual_seed(0)
    return _Block().eval(), (torch.randn(2, 4, 8, 8),)
