"""Keep some experts of each mixture: the others are removed, or merged into those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import CalibrationError, ParseError
from sparsify_compiler.fold import erase_dead, leaves, put
from sparsify_compiler.named import Named
from sparsify_compiler.passes.moe import _merge, _routing
from sparsify_compiler.passes.moe._observed import Observed, gather
from sparsify_compiler.passes.moe._refused import added
from sparsify_compiler.passes.moe._routing import Mixture, mixtures
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, get_tensor
from sparsify_compiler.selectors import select
from sparsify_compiler.splice import insert_formula

KIND = ("moe",)
TABLE = "table of experts"  # in the metadata of a choice that was renamed: the tensor that says how, and the choice before


@dataclass(frozen=True)
class DropExperts(Pass):
    """Keep the experts of a mixture that score highest. A row that would choose another takes the next best of those, or what it was merged into.

    Matches    experts_ffn(x, choice of scores, weights, gate[E], up[E], down[E], ...), of the model itself or as split_experts makes it
    Rewrites   experts_ffn(x, table[choice of scores], weights, gate[E'], up[E'], down[E'], ...), the scores of removed experts being -inf
    Preserves  signature; with all experts kept, also values
    Paper      Task-Specific Expert Pruning, Chen et al., arXiv:2206.00277; merging as in M-SMoE, Li et al., arXiv:2310.01334, of the groups of
               HC-SMoE, Chen et al., arXiv:2410.08589

    score    a file of passes/moe/expert_scores
    instead  what is there for an expert that goes: "nothing", or "merged": experts whose outputs are alike become one, their mean weighted with
             how often each is chosen, neurons matched one by one; the score then says to whose neurons
    budget   "uniform": each mixture keeps as many; "global": the highest scores of all mixtures, each divided by its mixture's mean
    density  kept / all experts; by default the user's budget. Each mixture keeps at least one
    targets  selectors of mixtures; all by default
    ignore   selectors of mixtures that keep all experts

    Calibrate on texts of the task that the model is to do: which experts matter depends on it.
    """

    score: str = "routed"
    instead: Literal["nothing", "merged"] = "nothing"
    budget: Literal["uniform", "global"] = "uniform"
    density: float | None = None
    targets: tuple[str, ...] = KIND
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    idempotent: ClassVar[bool] = False  # a second time drops a share of what is left

    def __post_init__(self) -> None:
        Named.parse("expert score", self.score)
        for name, known in (("instead", ("nothing", "merged")), ("budget", ("uniform", "global"))):
            if getattr(self, name) not in known:
                raise ParseError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}", where="drop_experts")
        self.check_density(self.density)
        self.take_selectors("targets", "ignore")

    def run(self, program: Program, ctx: Context) -> Program:
        density, found = self.density_of(ctx), self._chosen(program, ctx)
        if density == 1 or not found:
            return program
        if not ctx.batches:
            raise CalibrationError("experts are scored on rows of calibration, and there are none", where=self.name(),
                                   hint="give calibration=batches")
        score = Named.parse("expert score", self.score)
        counts = [max(1, round(density * one.experts)) for one in found]
        if self.budget == "global":
            counts = _shared_out([score(evidence) for _, evidence in gather(program, found, ctx)], sum(counts))
        for done, (mixture, evidence) in enumerate(gather(program, found, ctx)):
            if counts[done] < mixture.experts and ctx.spend():
                self._drop(program, mixture, evidence, score(evidence), counts[done])
            ctx.progress("drop experts", done + 1, len(found))
        return program

    def _chosen(self, program: Program, ctx: Context) -> list[Mixture]:
        every = mixtures(program, ctx)
        named = {site.path for site in select([one.site for one in every], self.targets, self.ignore, program)} if every else set()
        found = []
        for one in every:
            if one.site.path in named:
                why = one.unfit()
                if why is None:
                    found.append(one)
                else:
                    ctx.miss(why, one.site.path)
        return found

    def _drop(self, program: Program, mixture: Mixture, evidence: Observed, scores: Tensor, count: int) -> None:
        if self.instead == "merged":
            kept, groups = _merge.alike(evidence, scores, count)
            tensors = _merge.merged(evidence, kept, groups)
        else:
            kept = scores.argsort(descending=True, stable=True)[:count].sort().values
            groups = torch.full((mixture.experts,), -1).index_copy_(0, kept, torch.arange(count))
            tensors = {name: tensor[kept] for name, tensor in mixture.tensors().items()}
            _refuse(mixture, groups < 0, self.name())
        missed = float((groups[evidence.chosen.clamp_min(0)] < 0).float().mean())
        row = program.decisions.get(mixture.site.path) or Decision.of(mixture.site.path, "experts", evidence.tensors["gate"])
        row.structure, row.density, row.budget = f"{count} of {mixture.experts} experts kept", count / mixture.experts, count / mixture.experts
        row.bytes = round((row.dense_bytes or 0) * row.density)
        others = "merged into them" if self.instead == "merged" else f"gone, which {missed:.0%} of the choices named"
        row.reason = f"by {self.score}; the others are {others}"
        program.decisions[mixture.site.path] = row
        _write(mixture, tensors, groups, self.name())


def _shared_out(scores: Sequence[Tensor], total: int) -> list[int]:
    """How many experts each mixture keeps when the `total` highest of all do: at least one each."""
    relative = [one / one.mean().clamp_min(1e-30) for one in scores]
    best = [int(one.argmax()) for one in relative]
    for one, at in zip(relative, best, strict=True):
        one[at] = torch.inf
    order = torch.cat(relative).argsort(descending=True, stable=True)[:total]
    owner = torch.repeat_interleave(torch.arange(len(scores)), torch.tensor([one.numel() for one in scores]))
    return torch.bincount(owner[order], minlength=len(scores)).tolist()


def _refuse(mixture: Mixture, gone: Tensor, by: str) -> None:
    """No row chooses an expert that is gone, where its router's scores are known."""
    scores = mixture.scores
    if scores is None:
        return
    names = _names(mixture, int(scores.meta["val"].shape[-1]))
    refused = torch.cat([gone, torch.tensor([False])])[names]
    penalty = torch.zeros(refused.shape, dtype=scores.meta["val"].dtype).masked_fill(refused, -torch.inf)
    added(mixture.region, scores, penalty, "refused", by)


def _names(mixture: Mixture, experts: int) -> Tensor:
    """int64 [experts]: what the op calls each expert that the router knows, -1 for one that is gone: they were renamed where some went before."""
    tables, node = [], mixture.op.kwargs["chosen"]
    while TABLE in node.meta:
        table, node = node.meta[TABLE]
        tables.append(get_tensor(mixture.region.module, table))
        node = mixture.region.node(node)
    found = torch.arange(experts)
    for table in reversed(tables):
        found = table[found]
    return found


def _write(mixture: Mixture, tensors: dict[str, Tensor], groups: Tensor, by: str) -> None:
    """The kept experts in the place of all, and a table from the numbers that the router knows to theirs; its last entry is for -1."""
    region, op, old = mixture.region, mixture.op, mixture.stacked
    for name, node in old.items():
        made = put(region, op, tensors[name].to(node.meta["val"].dtype), name, leaves(node), op.meta, by)
        op.kwargs = {**op.kwargs, name: made}
    table, chosen = put(region, op, torch.cat([groups, torch.tensor([-1])]), "table", (), op.meta, by), op.kwargs["chosen"]
    renamed = insert_formula(region, op, _renamed, {"chosen": chosen, "table": table}, by)
    renamed.meta[TABLE] = str(table.target), chosen.name
    op.meta["site"] = mixture.site.path
    op.kwargs = {**op.kwargs, "chosen": renamed}
    erase_dead(list(old.values()))


def _renamed(chosen: Tensor, table: Tensor) -> Tensor:
    return table[chosen.long()]


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Six rows of four experts."""
    return _routing.example()
