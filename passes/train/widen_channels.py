"""Make a model wider, for training it with as many weights as before."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.axis import Atom
from sparsify_compiler.channel_cut import cut_channels
from sparsify_compiler.channel_groups import KINDS, Group, Groups, find_groups
from sparsify_compiler.errors import ParseError
from sparsify_compiler.normal_form_edit import aten, is_call
from sparsify_compiler.operands import CONVOLUTIONS
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, get_tensor, set_tensor
from sparsify_compiler.selectors import select

DEFAULT = ("neurons", "filters")


@dataclass(frozen=True)
class WidenChannels(Pass):
    """Give each dependency group more units, so many that at a density the model multiplies as often as it did dense; mask_weights() cuts it.

    Matches    every dimension of a parameter that can grow, with those that must grow with it (see sparsify_compiler/channel_groups.py)
    Rewrites   linear(x, w, b), conv, norm, embedding and their like, with more rows, columns and entries of w and b; sizes in reshapes likewise
    Preserves  signature
    Paper      Sparse Wide of Sparse-IFT, arXiv:2303.11525; start="copies": Net2WiderNet of Net2Net, arXiv:1511.05641

    density   that all linear layers and convolutions are to have then; the same factor for all chosen groups follows
    start     "fresh": weights are drawn anew from their own values, those of layers with more inputs scaled as such start (tables of embeddings
              are not, nor what is tied to one); for a model that is not trained.
              "copies": units are repeated and what reads them divided, so that an untouched model of no norms over them gives what it gave
    seed      of what is drawn
    targets   selectors of groups, as in remove_channels()
    ignore    selectors of groups that stay
    """

    density: float = 0.5
    start: Literal["fresh", "copies"] = "fresh"
    seed: int = 0
    targets: tuple[str, ...] = DEFAULT
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    idempotent: ClassVar[bool] = False  # a second time widens what is wide

    def __post_init__(self) -> None:
        self.check_density(self.density)
        if self.start not in ("fresh", "copies"):
            raise ParseError(f"start is 'fresh' or 'copies', not {self.start!r}", where="widen_channels")
        self.take_selectors("targets", "ignore")

    def own_density(self) -> float | None:
        """What is kept is mask_weights()' business."""
        return None

    def run(self, program: Program, ctx: Context) -> Program:
        groups = find_groups(program)
        chosen = [group for group in self._chosen(groups, program, ctx) if ctx.spend()]
        counts = {group.atom: _counts(group.size, self._factor(program, groups, chosen)) for group in chosen}
        members = [one for group in chosen for one in group.members]
        before = {(one.region.path, one.name): one.tensor for one in members}
        read = {(one.region.path, one.name) for one in members if one.reads}
        tables = {(one.region.path, one.name) for one in members if any(is_call(node, aten.embedding.default) for node in one.writes)}
        divisors = self._divisors(groups, chosen, counts) if self.start == "copies" else {}
        cut_channels(program, groups.found, counts, self.name())
        done: dict[int, tuple[Tensor, Tensor]] = {}  # what tied names held, kept so that no address is used twice, and what they hold then
        for (path, name), old in before.items():
            module = program.regions[path].module
            now = get_tensor(module, name)
            if id(now) not in done:
                scaled = (path, name) in read - tables
                made = self._started(now.detach(), old.detach(), divisors.get((path, name), {}), name, scaled)
                done[id(now)] = now, nn.Parameter(made, old.requires_grad) if isinstance(now, nn.Parameter) else made
            set_tensor(module, name, done[id(now)][1])
        return program

    def _chosen(self, groups: Groups, program: Program, ctx: Context) -> list[Group]:
        """The groups that grow."""
        kinds = {group.kind for group in groups.groups}
        targets = tuple(target for target in self.targets if target in kinds or target not in KINDS)
        wanted = {(site.kind, site.path) for site in (select([one.site for one in groups.groups], targets, self.ignore, program) if targets else [])}
        named = [group for group in groups.groups if (group.kind, group.path) in wanted]
        for group in named:
            if group.fixed is not None:
                ctx.miss(f"its {group.size} {group.kind} stay: {group.fixed}", group.path)
        if not named:
            ctx.miss(f"no group of kind {', '.join(self.targets)}")
        return [group for group in named if group.fixed is None]

    def _factor(self, program: Program, groups: Groups, chosen: Sequence[Group]) -> float:
        """By bisection up to 1 / density: the largest at which what is multiplied, times the density, is no more than before."""
        layers = [(node, node.kwargs["weight"]) for _, node in program.nodes() if is_call(node, aten.linear.default, *CONVOLUTIONS)]
        dense = _work(layers, groups, {})
        low, high = 1.0, 1 / self.density
        middle = high
        for _ in range(25):
            fits = self.density * _work(layers, groups, {group.atom: _counts(group.size, middle) for group in chosen}) <= dense
            low, high = (middle, high) if fits else (low, middle)
            middle = (low + high) / 2
        return low

    def _divisors(self, groups: Groups, chosen: Sequence[Group], counts: Mapping[Atom, Tensor]) -> dict[tuple[str, str], dict[int, Tensor]]:
        """Of each weight that reads repeated units: dimension -> how often the unit is there, for every index behind the cut."""
        found: dict[tuple[str, str], dict[int, Tensor]] = {}
        for one in (one for group in chosen for one in group.members if one.reads):
            axes = groups.found.axes
            found.setdefault((one.region.path, one.name), {})[one.dim] = axes.kept(one.axis, counts)[axes.index(one.axis, counts)]
        return found

    def _started(self, now: Tensor, old: Tensor, divisors: Mapping[int, Tensor], name: str, scaled: bool) -> Tensor:
        for dim, often in divisors.items():
            now = now / often.to(now).view(-1, *[1] * (now.dim() - dim - 1))
        if self.start == "copies" or now.dim() < 2 or not now.is_floating_point():
            return now.clone()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        drawn = torch.randint(old.numel(), now.shape, generator=generator).to(old.device)
        return old.flatten()[drawn] * (math.sqrt(old[0].numel() / now[0].numel()) if scaled else 1.0)


def _counts(size: int, factor: float) -> Tensor:
    """How often each of the units is there, so that there are factor times as many: int64 [size]."""
    wanted = max(size, math.floor(size * factor + 1e-6))
    return torch.full((size,), wanted // size, dtype=torch.int64) + (torch.arange(size) < wanted % size)


def _work(layers: Sequence[tuple[fx.Node, fx.Node]], groups: Groups, counts: Mapping[Atom, Tensor]) -> float:
    """Multiply-adds of all layers, but for what is the same in all: batch and length."""
    axes, total = groups.found.axes, 0.0
    for node, weight in layers:
        dims = groups.found.values.get(weight)
        shape = weight.meta["val"].shape
        known = dims if isinstance(dims, list | tuple) and len(dims) == len(shape) else [None] * len(shape)
        sizes = [size if axis is None else int(axes.kept(axis, counts).sum()) for size, axis in zip(shape, known, strict=True)]
        positions = node.meta["val"].shape[2:] if len(shape) > 2 else ()
        total += math.prod(sizes) * math.prod(int(size) for size in positions)
    return total


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two linear layers with neurons between them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)).eval(), (torch.randn(2, 8),)
