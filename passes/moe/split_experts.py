"""Divide each FFN into experts, of which a row runs through some."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.passes.moe._condition import by_condition, condition, unconditioned
from sparsify_compiler.passes.moe._criteria import CRITERIA, wanted
from sparsify_compiler.passes.moe._evidence import Evidence, Formula
from sparsify_compiler.passes.moe._free import Free, ffns_of, with_columns
from sparsify_compiler.passes.moe._sites import Dense, dense_of, gather
from sparsify_compiler.passes.moe._split import Split, divided, filled
from sparsify_compiler.passes.moe._write import Routing, write
from sparsify_compiler.passes.moe.routers._base import Task
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Stage

KIND = ("ffn",)
SAMPLE = 512  # rows that are routed at one time
KINDS = {"partition": "partition", "router": "router", "selector": "expert selector", "importance": "importance", "weight": "expert weight",
         "repair": "expert repair"}  # option -> kind of the catalogue


@dataclass(frozen=True)
class SplitExperts(Pass):
    """Divide the neurons of each FFN into experts: a router scores them, and a row runs through those that a selector chooses, and the shared one.

    Matches    linear(act(linear(x, gate)) * linear(x, up), down), and without a gate linear(act(linear(x, up)), down), also with one linear for both
    Rewrites   experts_ffn(x, selector(router(x)), weights, gate[E], up[E], down[E]) + linear(act(linear(x, gate')) * linear(x, up'), down')
    Preserves  signature; with every expert chosen, weights of 1 and no repair but "mean", also values
    Paper      MoEfication, Zhang et al., arXiv:2110.01786; shared experts as in CMoE, Pei et al., arXiv:2502.04416

    experts     how many, beside the shared one
    partition   a file of passes/moe/partitions: which neurons make an expert
    router      a file of passes/moe/routers, of what the FFN reads
    selector    a file of passes/moe/selectors; "top_k(k=4)" fixes the number, whatever the density
    shared      share of the neurons that every row computes; a little more where the others then make experts of whole vectors
    importance  a file of passes/moe/importances, which says which neurons those are
    weight      a file of passes/moe/weights: what an expert's output is multiplied with
    repair      a file of passes/moe/repairs: what makes up for the experts that are skipped
    criterion   what makes an expert matter in a row: "output", the length of what it adds; "norm", the same were its neurons' columns at right
                angles; "positive", the sum of its positive neurons
    free        files of passes/moe/free_experts, which stand in the choice beside the others and cost nothing: "zero", "copy", "constant"
    residual    scores also depend on those of the mixture before, by a linear map that begins as zeros
    given       path of a module of the same graph that gives [texts, width], a time or a condition: the router scores that, so that all tokens of a
                text have the same experts. It is "random" then, to be trained, and repair is "none"
    density     computed / all neurons of a row, the shared ones among them; by default the user's budget
    targets     selectors of FFN sites; all by default
    ignore      selectors of FFN sites that stay dense

    What is stored is trainable: router, experts and all. Experts whose sizes do not divide are filled up with zeros. Needs calibration, unless
    partition, router, selector, importance and repair do without.
    """

    experts: int = 16
    partition: str = "balanced_kmeans"
    router: str = "ridge"
    selector: str = "top_k"
    shared: float = 0.25
    importance: str = "contribution"
    weight: str = "one"
    repair: str = "mean"
    criterion: Literal["output", "norm", "positive"] = "output"
    free: tuple[str, ...] = ()
    residual: bool = False
    given: str = ""
    density: float | None = None
    targets: tuple[str, ...] = KIND
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        for option in KINDS:
            self._named(option)
        if self.experts < 1 or not 0 <= self.shared < 1:
            raise ParseError(f"experts is 1 or more and shared lies between 0 and 1, got {self.experts} and {self.shared}", where="split_experts")
        if self.criterion not in CRITERIA:
            raise ParseError(f"criterion is one of {tuple(CRITERIA)}, not {self.criterion!r}", where="split_experts")
        if self.given and (self.router, self.repair, self.free) != ("random", "none", ()):
            raise ParseError("a router of what a module gives is random, without repair and free experts", where="split_experts",
                             hint="router='random', repair='none'")
        object.__setattr__(self, "free", tuple(self.free))
        for name in self.free:
            Named.parse("free expert", name)
        self.take_selectors("targets", "ignore")
        self.check_density(self.density)

    def run(self, program: Program, ctx: Context) -> Program:
        density = None if self._fixed() else self.density_of(ctx)
        found: list[Dense] = []
        for site in self.ffns(program, ctx):
            dense = dense_of(program.regions[site.region], site, self.name())
            why = _unfit(dense, self.experts, self.shared) or unconditioned(dense, self.given)
            if why is not None:
                ctx.miss(why, site.path)
            elif isinstance(dense, Dense) and ctx.spend():
                found.append(dense)
        for done, (dense, evidence) in enumerate(gather(program, found, self._statistics(), ctx)):
            self.split(program, dense, evidence, density)
            ctx.progress("split experts", done + 1, len(found))
        return program

    def split(self, program: Program, dense: Dense, evidence: Evidence, density: float | None) -> None:
        """Divide one FFN, by what calibration saw of it. density None: the selector knows how many experts it takes."""
        part, route, select, repair = (self._named(option) for option in ("partition", "router", "selector", "repair"))
        key = (self.partition, self.importance, self.shared, self.experts)
        always, table = evidence.once(key, partial(self._divided, evidence))
        importance = evidence.once((*key, self.criterion), partial(wanted, self.criterion, evidence, table))
        split = Split.of(dense.ffn, table, always)
        share = self._share(split, evidence.ffn.neurons, density)
        given = condition(dense, self.given)
        if given is None:
            router: Formula = route(Task(evidence, table, share, importance, self.criterion))
            scores = _scores(router, Split.of(evidence.ffn, table, always), evidence)
        else:
            router, scores = by_condition(given, self.experts, evidence), _drawn(self.experts, evidence)
        free = Free.of(self.free, evidence, scores, share) if self.free else None
        scores = _with_free(free, scores, evidence)
        number = select.module.calibrate(scores, share if share >= 1 else share * self.experts / scores.shape[1], **select.options)
        chosen = ffns_of(select(scores, number), self.experts)
        found = split.activated(chosen, evidence.ffn.neurons)
        if evidence.rows:
            split = repair(evidence, split, chosen)
        weight = self._named("weight")(scores.shape[1])
        write(dense, split, Routing(router, _selection(select, number), weight, free, self.residual, given), self.name())
        row = program.decisions[dense.site.path] = Decision.of(dense.site.path, "ffn", dense.ffn.down)
        row.structure, row.density, row.budget = f"experts by {route.name}", found, found if density is None else density
        row.reason = f"{self.experts} experts of {table.shape[1]} neurons by {part.name}, {always.numel()} shared; router {route.name}, {select.name}"

    def own_density(self) -> float | None:
        fixed = self._fixed()
        return self.density if fixed is None else self.shared + (1 - self.shared) * min(fixed / self.experts, 1.0)

    def _named(self, option: str) -> Named:
        return Named.parse(KINDS[option], getattr(self, option))

    def _fixed(self) -> int | None:
        """How many experts the selector takes, where it says so itself."""
        found: int = self._named("selector").options.get("k", 0)
        return found or None

    def _statistics(self) -> frozenset[str]:
        return frozenset(name for option in KINDS for name in self._named(option).statistics)

    def _divided(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """(the neurons that are always computed, the table of the others)."""
        count = evidence.ffn.neurons
        importance = self._named("importance")(evidence) if self.shared else torch.zeros(count, dtype=torch.float32)
        always, routed = divided(evidence, importance, self.shared, self.experts)
        return always, filled(self._named("partition")(evidence, routed, self.experts))

    def _share(self, split: Split, neurons: int, density: float | None) -> float:
        """Of the experts, how many make the density: at least one of several. One alone may be left out of rows."""
        fixed = self._fixed()
        size = float((split.table >= 0).sum(1).double().mean())
        wished = (density or 0.0) * neurons - split.always.numel()
        experts = wished / size if fixed is None else float(fixed)
        least = 1 / self.experts if self.experts > 1 else 0.0
        return min(max(experts / self.experts, least), 1.0)


def _unfit(dense: Dense | str, experts: int, shared: float) -> str | None:
    if isinstance(dense, str):
        return dense
    routed = dense.ffn.neurons - round(shared * dense.ffn.neurons)
    return f"{routed} neurons make no {experts} experts" if routed < experts else None


def _selection(select: Named, number: float) -> Formula:
    """The selector in the graph: its number is a literal, or where it may move a buffer."""
    if getattr(select.module, "MOVES", False):
        return Formula({}, lambda scores, limit: select(scores, limit), {"limit": torch.tensor(number, dtype=torch.float32)})
    return Formula({}, lambda scores: select(scores, number))


def _scores(router: Formula, split: Split, evidence: Evidence) -> Tensor:
    """float32 [R, E] on the rows of calibration; random ones where there are none, which say of a selector how many experts it takes."""
    if not evidence.rows:
        return _drawn(split.experts, evidence)
    known = {**split.own, "down": split.down}
    wanted = inspect.signature(router.function).parameters
    given = {name: value for name, value in known.items() if name in wanted} | dict(router.tensors) | dict(router.buffers)
    return torch.cat([router.function(x, **given) for x in torch.split(evidence.x, SAMPLE)])


def _drawn(experts: int, evidence: Evidence) -> Tensor:
    return torch.randn(SAMPLE, experts, generator=evidence.generator(), dtype=torch.float32)


def _with_free(free: Free | None, scores: Tensor, evidence: Evidence) -> Tensor:
    """The scores of all experts on the rows that they were computed for."""
    if free is None:
        return scores
    rows = evidence.x if evidence.rows else torch.zeros(scores.shape[0], evidence.ffn.gate.shape[1], dtype=torch.float32)
    return with_columns(scores, rows, **free.columns.tensors)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A gated FFN of 64 neurons."""
    from sparsify_compiler.passes.activation.select_neurons import GatedFfn

    torch.manual_seed(0)
    return GatedFfn(16, 64).eval(), (torch.randn(40, 16),)
