"""Let each row keep some of the channels that layers read: those that all rows share, and groups that a router chooses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.calibrate_rows import collect_rows
from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import CalibrationError, ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.passes.activation._units import in_groups
from sparsify_compiler.passes.moe._depth import check_router, router_of, unseen
from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes.moe._placed import Placed
from sparsify_compiler.passes.moe.selectors.top_k import top_k
from sparsify_compiler.passes.prune._layers import DEFAULT, Layer, Use, find_layers
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Stage

Reader = tuple[Use, Tensor]  # a linear, and its weight


@dataclass(frozen=True)
class _Read:
    """What linears read, and those."""

    x: fx.Node
    readers: list[Reader]

    @property
    def place(self) -> tuple[str, str]:
        """Where its rows are."""
        return self.readers[0][0].region.path, self.x.name

    @property
    def bytes_a_row(self) -> int:
        """Of the rows that are kept."""
        return 4 * int(self.x.meta["val"].shape[-1])


@dataclass(frozen=True)
class RouteChannels(Pass):
    """Let each row keep the shared channels of what linears read, and those groups of the others that a router scores highest.

    Matches    linear(x, weight, bias); linears that read the same x, such as those of query, key and value, have one router
    Rewrites   linear(x * kept * scale, weight, bias): kept is 1 for shared channels, the weight of its group for others, 0 where that is not chosen
    Preserves  signature; with a density of 1 and weights of 1, also values
    Paper      MoHD, Chen et al., arXiv:2412.05644

    density  channels kept / all; by default the user's budget
    shared   share of the channels that every row keeps: those whose columns of weights, times the channel where calibration saw it, are longest
    groups   how many the others are divided into, as they stand
    router   "random", to be trained, or "ridge", fitted to what each group gives on calibration
    weight   a file of passes/moe/weights: of the groups that are chosen, brought to a mean of 1
    scale    bring a row back to the length that it had
    targets  selectors of sites, as in mask_weights
    ignore   selectors of sites that read all of their inputs

    What is left out is 0 exactly: select_inputs(selector="nonzero") behind it reads the weights of the others only. The paper also mixes channels
    before they are grouped, which is not done here.
    """

    density: float | None = None
    shared: float = 0.25
    groups: int = 16
    router: str = "random"
    weight: str = "one"
    scale: bool = True
    targets: tuple[str, ...] = DEFAULT
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        check_router(self.router, self.name())
        Named.parse("expert weight", self.weight)
        if self.groups < 1 or not 0 <= self.shared < 1:
            raise ParseError(f"groups is 1 or more and shared lies in [0, 1), got {self.groups} and {self.shared}", where=self.name())
        self.take_selectors("targets", "ignore")
        self.check_density(self.density)

    def run(self, program: Program, ctx: Context) -> Program:
        density, found = self.density_of(ctx), self._found(program, ctx)
        if found and not ctx.batches and check_router(self.router, self.name()).statistics:
            raise CalibrationError("routers are fitted on rows of calibration, and there are none", where=self.name(), hint="router='random'")
        before = program.clone() if found and ctx.batches else None
        for group in in_groups([_Read(x, readers) for x, readers in found.items()], ctx.batches or ()):
            rows = {} if before is None else collect_rows(before, ctx.batches or (), [one.place for one in group])[0]
            for one in group:
                if ctx.spend():
                    self._route(program, one.x, one.readers, rows.get(one.place), density, ctx)
        return program

    def _found(self, program: Program, ctx: Context) -> dict[fx.Node, list[Reader]]:
        """What linears read -> those linears. A miss for each that stays as it is."""
        layers, left = find_layers(program, self.targets, self.ignore)
        for one in left:
            if one.chosen:
                ctx.miss(one.reason, one.use.site.path)
        found: dict[fx.Node, list[Reader]] = {}
        for layer in layers:
            for use in (one for one in layer.uses if one.op.meta.get("by") != self.name()):  # its own routers
                why = self._unfit(use, layer)
                if why is None:
                    found.setdefault(use.op.kwargs["input"], []).append((use, layer.weight))  # type: ignore[arg-type]
                else:
                    ctx.miss(why, use.site.path)
        return found

    def _unfit(self, use: Use, layer: Layer) -> str | None:
        x = use.op.kwargs.get("input")
        if use.site.kind != "linear" or not isinstance(x, fx.Node):
            return "it is no linear"
        if x.meta.get("by") == self.name():
            return "its channels are routed already"
        others = layer.weight.shape[1] - round(self.shared * layer.weight.shape[1])
        return f"{others} channels make no {self.groups} groups" if others < self.groups else None

    def _route(self, program: Program, x: fx.Node, readers: list[Reader], rows: Tensor | None, density: float, ctx: Context) -> None:
        columns = torch.stack([weight.detach().float().square().sum(0) for _, weight in readers]).sum(0)
        gives = columns[None] if rows is None else columns * rows.square()
        table, k = self._table(gives.mean(0), density)
        wanted = gives.new_zeros(gives.shape[0], self.groups + 1).index_add_(1, table + 1, gives)[:, 1:]
        known = (rows, wanted) if rows is not None and check_router(self.router, self.name()).statistics else unseen(columns.numel(), self.groups)
        first = min((use.op for use, _ in readers), key=list(x.graph.nodes).index)
        region, path = readers[0][0].region, str(first.meta.get("path", ""))
        placed = Placed(region, first, path, tuple(node for node in first.all_input_nodes if node.op == "get_attr"), x.meta["val"].dtype, self.name())
        router = router_of(Named.parse("router", self.router), columns.numel(), *known, k / self.groups, ctx.seed)
        scores = placed.formula("router", router, {"x": x}, {})
        chosen = placed.formula("router", Formula({}, partial(_chosen, k=k)), {"scores": scores}, {})
        weight = Named.parse("expert weight", self.weight)(self.groups) or Formula({}, _ones)
        weights = placed.formula("router", weight, {"scores": scores, "chosen": chosen}, {})
        made = Formula({}, partial(kept, groups=self.groups, scale=self.scale), {"table": table})
        new = placed.formula("router", made, {"x": x, "chosen": chosen, "weights": weights}, {})
        found = (int((table < 0).sum()) + k * int((table >= 0).sum()) / self.groups) / table.numel()
        for use, own in readers:
            use.op.kwargs = {**use.op.kwargs, "input": new}
            row = program.decisions.setdefault(use.site.path, Decision.of(use.site.path, "linear", own))
            row.structure, row.density, row.budget = "channels by a router", found, density
            row.reason = f"{int((table < 0).sum())} channels shared, {k} of {self.groups} groups; router {self.router}"

    def _table(self, importance: Tensor, density: float) -> tuple[Tensor, int]:
        """(int64 [K]: the group of each channel, -1 for shared ones; how many groups a row keeps, at least one)."""
        count, common = importance.numel(), round(self.shared * importance.numel())
        table = torch.zeros_like(importance, dtype=torch.int64).index_fill_(0, importance.argsort(descending=True, stable=True)[:common], -1)
        others = (table >= 0).nonzero()[:, 0]
        table[others] = torch.arange(count - common, dtype=torch.int64, device=table.device) * self.groups // (count - common)
        return table, min(max(round((density * count - common) / (count - common) * self.groups), 1), self.groups)


def kept(x: Tensor, chosen: Tensor, weights: Tensor, table: Tensor, *, groups: int, scale: bool) -> Tensor:
    """x [..., K] times the weight of each channel's group: chosen int64 [..., k], weights [..., k], table int64 [K]."""
    wide = torch.promote_types(x.dtype, torch.float32)  # float16 holds none of the smallest numbers here
    even = weights.to(wide) * chosen.shape[-1] / weights.to(wide).sum(-1, keepdim=True).clamp_min(1e-12)
    shares = torch.zeros(*chosen.shape[:-1], groups, dtype=wide, device=x.device).scatter(-1, chosen, even)
    found = x * torch.where(table < 0, 1.0, shares.index_select(-1, table.clamp_min(0))).to(x.dtype)
    if not scale:
        return found
    whole, part = (torch.linalg.vector_norm(one.to(wide), dim=-1, keepdim=True) for one in (x, found))
    return found * torch.where(part > 0, whole / part.clamp_min(1e-30), 1.0).to(x.dtype)


def _chosen(scores: Tensor, k: int) -> Tensor:
    return top_k(scores, k)


def _ones(scores: Tensor, chosen: Tensor) -> Tensor:
    return torch.ones_like(chosen, dtype=scores.dtype)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A gated FFN of 64 neurons, whose gate and up read the same."""
    from sparsify_compiler.passes.activation.select_neurons import GatedFfn

    torch.manual_seed(0)
    return GatedFfn(32, 64).eval(), (torch.randn(40, 32),)
