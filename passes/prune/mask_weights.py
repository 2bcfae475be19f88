"""Mask the weights that matter least."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sparsify_compiler.errors import BudgetError, ModelError, ParseError, SparsifyError, StructureError
from sparsify_compiler.named import Named
from sparsify_compiler.passes.prune._apply import Result, apply, leave_dense, sources_of
from sparsify_compiler.passes.prune._evidence import evidence_of
from sparsify_compiler.passes.prune._layers import DEFAULT, Layer, LeftDense, find_layers
from sparsify_compiler.passes.prune._visits import OF_LINEAR, DenseStatistics, DenseVisits, SweptVisits, Visits, gathered_on_the_way, summed
from sparsify_compiler.passes.prune.budgets._base import told
from sparsify_compiler.passes.prune.repairs._base import Cut, Repaired
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.prune.structures.unstructured import Unstructured
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Stage
from sparsify_compiler.sweep_checkpoint import Checkpoint, chosen_folder
from sparsify_compiler.sweep_gather import patches_of
from sparsify_compiler.work import Work

CHOSEN_BY_REPAIR = "repair"
RANKING = "weight_times_input_norm"  # what budgets compare where the repair chooses the masks


@dataclass(frozen=True)
class MaskWeights(Pass):
    """Keep the weights of each layer that score highest, under a structure, within a budget.

    Matches    linear(x, weight, bias) and conv(x, weight, bias, ...), weight a parameter
    Rewrites   linear(x, weight * mask, bias), mask a bool buffer beside the weight
    Preserves  signature; quality is measured
    Paper      none: the frame that magnitude pruning (arXiv:1506.02626), Wanda (arXiv:2306.11695) and their like fill in

    score      a file of passes/prune/scores, with options of its own in parentheses: "relative_importance(power=0.5)"
    structure  which weights may be kept together: Unstructured(), NM(n=2, m=4), Block(rows=16, columns=1), FanIn(), or "2:4" and the like
    budget     a file of passes/prune/budgets: how the density is shared out over the layers; "owl(spread=0.1)" with options
    density    kept / total over all selected layers; by default the structure's own (n/m), or else the user's budget; budget="given(...)" tells all
    targets    selectors of sites. All linear layers by default, output heads too: name a head in `ignore` to keep it dense.
               "ffn" and "attention" stand for the linear layers in them
    ignore     selectors of sites that stay dense
    on_misfit  what to do with a layer whose shape the structure does not divide: "error", or "skip" and say so
    seed       of a random score; by default the compile's own
    repair     a file of passes/prune/repairs, which mends the values that are kept; "obs(damping=0.1)" with options. score="repair" lets it
               choose what to keep too, where it can (obs, admm)
    inputs     what reaches a layer when its statistics are gathered: "dense", the dense model's activations, from one run for all layers (or more
               where memory is short), also where a pass like this one has cut other layers just before; "pruned", what the layers before it, cut
               and repaired, make of the batches; "block", the same, but within one residual block all layers see what its dense layers make, the
               order of Wanda's and SparseGPT's code. The last two walk through the layers in the order of execution, one group's statistics in
               memory, and need a model that was captured whole. Where SPARSIFY_CHECKPOINT names a folder, finished layers are kept there and a
               killed run goes on behind them

    A weight that something else reads too (an embedding tied to the output head) is left alone; one that several selected layers share
    is pruned once, by the sum of their scores. Layers that are masked already, or all zero, stay as they are.
    """

    score: str = "magnitude"
    structure: Structure | str = field(default_factory=Unstructured)
    budget: str = "uniform"
    density: float | None = None
    targets: tuple[str, ...] = DEFAULT
    ignore: tuple[str, ...] = ()
    on_misfit: Literal["error", "skip"] = "error"
    seed: int | None = None
    repair: str = "none"
    inputs: Literal["dense", "block", "pruned"] = "dense"

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE
    layer_by_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for kind, name in (("score", self.score), ("budget", self.budget), ("repair", self.repair)):
            if (kind, name) != ("score", CHOSEN_BY_REPAIR):
                Named.parse(kind, name)
        if self.score == CHOSEN_BY_REPAIR and not self._mended.module.CHOOSES:
            raise ParseError(f"the repair {self._mended.name} does not choose what to keep", where="mask_weights", hint="name a score")
        if self.inputs not in ("dense", "block", "pruned"):
            raise ParseError(f"inputs is 'dense', 'block' or 'pruned', not {self.inputs!r}", where="mask_weights")
        if isinstance(self.structure, str):
            object.__setattr__(self, "structure", Structure.parse(self.structure))
        self.take_selectors("targets", "ignore")
        if self.on_misfit not in ("error", "skip"):
            raise ParseError(f"on_misfit is 'error' or 'skip', not {self.on_misfit!r}", where="mask_weights")
        self.check_density(self.density)

    def needs(self, program: Program) -> Mapping[str, frozenset[str]]:
        """All that is asked of the dense model. What a sweep gathers on its way is none of it."""
        score, repair = self._scored.statistics, tuple(OF_LINEAR.get(name, name) for name in self._mended.statistics)
        if self.inputs != "dense":
            score, repair = tuple(name for name in score if not gathered_on_the_way(name)), ()
        statistics = frozenset((*score, *repair, *self._shared.statistics))
        layers = find_layers(program, self.targets, self.ignore)[0] if statistics else []
        return {use.site.path: statistics for layer in layers for use in layer.uses}

    def own_density(self) -> float | None:
        own = self.density if self.density is not None else self._structure.density
        return own if own is not None else told(self._shared.options)

    def work(self, shape: tuple[int, int], rows: int, density: float, dtype: str, between: int) -> tuple[Work, ...]:
        return (Work.of(shape, rows, self._structure, density, dtype, between),)

    def run(self, program: Program, ctx: Context) -> Program:
        density = self._density(ctx)
        layers, left = find_layers(program, self.targets, self.ignore)
        if not layers and not left:
            ctx.miss("the model has no linear or convolution sites")
        fitting = [layer for layer in layers if self._fits(layer, density, left)]
        densities = self._densities(program, fitting, density, ctx)
        left += [LeftDense(use, "its budget is density 1") for layer in fitting if densities[layer.path] >= 1 for use in layer.uses]
        cut = [layer for layer in fitting if densities[layer.path] < 1]
        for site in left:
            leave_dense(site, program, ctx)
        for step in self._cut_all(program, cut, densities, ctx) if cut else ():
            step()
        return program

    def _cut_all(self, program: Program, cut: list[Layer], densities: Mapping[str, float], ctx: Context) -> list[Callable[[], None]]:
        """Cut layer by layer; what is left to do when all are."""
        visits = self._visits(program, ctx)
        kept = self._checkpoint(program, densities, ctx)
        done, later = 0, list[Callable[[], None]]()
        for group in visits.groups(program, cut):
            stored = {layer.path: kept.read(layer.path) for layer in group} if kept is not None else {}
            if not all(stored.get(layer.path) for layer in group):
                visits.enter(group)
            for layer in group:
                if not ctx.spend():
                    return later
                with _placed(layer):
                    before = stored.get(layer.path)
                    result = Result.of(before) if before else self._cut(layer, densities[layer.path], visits, ctx)
                if kept is not None and not before:
                    kept.write(layer.path, result.tensors())
                if result.note:
                    ctx.miss(result.note, layer.path)
                visits.leave(sources_of(layer), result.whole(layer.weight))
                later += apply(layer, result, str(self.structure), densities[layer.path], program)
                done += 1
                ctx.progress("mask weights", done, len(cut))
        return later

    def _densities(self, program: Program, layers: list[Layer], density: float, ctx: Context) -> dict[str, float]:
        """What the budget gives to each layer, on the evidence of the dense model."""
        shapes = {layer.path: tuple(layer.weight.shape) for layer in layers}
        ranking = Named.parse("score", RANKING if self.score == CHOSEN_BY_REPAIR else self.score)
        needed = self.needs(program)
        more = {use.site.path: frozenset(ranking.statistics) - needed.get(use.site.path, frozenset()) for layer in layers for use in layer.uses}
        found = DenseStatistics(ctx, program, more)
        visits = DenseVisits(found)
        evidence = evidence_of(program, layers, lambda layer: self._score(layer, ranking, visits, ctx), found)
        shared: dict[str, float] = self._shared(shapes, density, evidence)
        return shared

    def _visits(self, program: Program, ctx: Context) -> Visits:
        dense = DenseStatistics(ctx, program, {})
        if self.inputs == "dense":
            return DenseVisits(dense)
        names = (*filter(gathered_on_the_way, self._scored.statistics), *self._mended.statistics)
        return SweptVisits(program, ctx.batches, self.inputs == "block", names, dense)

    def _checkpoint(self, program: Program, densities: Mapping[str, float], ctx: Context) -> Checkpoint | None:
        """Where finished layers are kept, if the user says where."""
        folder = chosen_folder()
        if folder is None or ctx.batches is None or self.inputs == "dense":
            return None
        return Checkpoint(folder, program, ctx.batches, f"{self} seed {ctx.seed} {sorted(densities.items())}")

    def _cut(self, layer: Layer, density: float, visits: Visits, ctx: Context) -> Result:
        """The mask of a layer, and its values where they are repaired."""
        weight, mask = layer.weight.detach(), None
        if self.score != CHOSEN_BY_REPAIR:
            mask = self._structure.mask(self._score(layer, self._scored, visits, ctx), density)
        if mask is not None and self._mended.name == "none":
            return Result(mask)
        if not _can_be_repaired(layer) and mask is not None:
            return Result(mask, note=f"the repair {self._mended.name} does not know this kind of convolution: its values stay")
        flat = weight.reshape(weight.shape[0], -1).to(torch.promote_types(weight.dtype, torch.float32))
        statistics = summed(visits, layer, self._mended.statistics)
        cut = Cut(flat, None if mask is None else mask.reshape(flat.shape), self._structure, density, statistics)
        found: Repaired = self._mended(cut)
        if not bool(found.weight.isfinite().all()):
            raise ModelError(f"the repair {self.repair} gave NaN or infinity", hint="raise its damping, or give more calibration batches")
        bias = None if found.bias is None else found.bias.to(weight.dtype)
        if found.low_rank is not None and any(use.site.kind != "linear" for use in layer.uses):
            raise StructureError("a low-rank part can stand beside linear layers only", where=layer.path, hint="name this layer in ignore=")
        low_rank = None if found.low_rank is None else (found.low_rank[0].to(weight.dtype), found.low_rank[1].to(weight.dtype))
        return Result(found.mask.reshape(weight.shape), found.weight.to(weight.dtype).reshape(weight.shape), bias, found.note, low_rank)

    @property
    def tries_many(self) -> bool:
        """Can it tell of several densities together what would become of a layer (see weights_at)? Of a repair that knows how."""
        return self.score == CHOSEN_BY_REPAIR and self.inputs == "dense" and hasattr(self._mended.module, "at_densities")

    def weights_at(self, layer: Layer, densities: Sequence[float], program: Program, ctx: Context) -> list[Tensor] | None:
        """The weights [out, K] that a layer would have at each density, by the statistics in ctx; None where the structure does not fit."""
        if not all(self._fits(layer, density, []) for density in densities):
            return None
        weight = layer.weight.detach().flatten(1)
        statistics = summed(DenseVisits(DenseStatistics(ctx, program, {})), layer, self._mended.statistics)
        cut = Cut(weight.to(torch.promote_types(weight.dtype, torch.float32)), None, self._structure, densities[0], statistics)
        found: list[Tensor] = self._mended.module.at_densities(cut, densities, **self._mended.options)
        return [one.to(weight.dtype) for one in found]

    @property
    def _structure(self) -> Structure:
        assert isinstance(self.structure, Structure)  # __post_init__ saw to it
        return self.structure

    def _density(self, ctx: Context) -> float:
        for density in (self.density, told(self._shared.options), ctx.density, self._structure.density):
            if density is not None:
                return density
        raise BudgetError("no density was given", where="mask_weights",
                          hint="mask_weights(density=0.5), compile(..., budget=Budget(density=0.5)), or --density 0.5 on the command line")

    def _fits(self, layer: Layer, density: float, left: list[LeftDense]) -> bool:
        """Can this layer be pruned? Notes in `left` why not. Raises ModelError, and StructureError when a misfit is an error."""
        weight = layer.weight
        if not bool(weight.isfinite().all()):
            raise ModelError("the weight holds NaN or infinity", where=layer.path, hint="repair the checkpoint, or name this layer in ignore=")
        reason = "every weight is zero" if not bool(weight.any()) else None
        if reason is None and density < 1:
            if self.on_misfit == "skip":
                reason = self._structure.misfit(weight.shape[0], weight[0].numel())
            if reason is None:
                with _placed(layer):
                    self._structure.check(tuple(weight.shape), density)
        left += [LeftDense(use, reason) for use in layer.uses if reason is not None]
        return reason is None

    @property
    def _scored(self) -> Named:
        return Named(CHOSEN_BY_REPAIR, _not_scored) if self.score == CHOSEN_BY_REPAIR else Named.parse("score", self.score)

    @property
    def _shared(self) -> Named:
        return Named.parse("budget", self.budget)

    @property
    def _mended(self) -> Named:
        return Named.parse("repair", self.repair)

    def _score(self, layer: Layer, scored: Named, visits: Visits, ctx: Context) -> Tensor:
        """The score of the layer's weight, summed over the sites that share it."""
        total: Tensor | None = None
        for use in layer.uses:
            given = {name: visits.statistic(use, name) for name in scored.statistics}
            seed = zlib.crc32(f"{self.seed if self.seed is not None else ctx.seed} {use.site.path}".encode())
            score: Tensor = scored(layer.weight.detach(), given, seed)
            total = score if total is None else total + score
        assert total is not None
        return total


def _not_scored(*given: object) -> Tensor:
    raise ParseError("the repair chooses what to keep: there is no score", where="mask_weights")


def _can_be_repaired(layer: Layer) -> bool:
    return all(patches_of(use.op) is not None for use in layer.uses)


@contextmanager
def _placed(layer: Layer) -> Iterator[None]:
    """Add the layer's path to an error that does not know it."""
    try:
        yield
    except SparsifyError as error:
        if error.where.split(", ")[0] == layer.path:
            raise
        raise type(error)(error.what, where=f"{layer.path}, {error.where}" if error.where else layer.path, hint=error.hint) from error


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), (torch.randn(2, 16),)
