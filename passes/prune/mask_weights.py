"""Mask the weights that matter least."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from sparsify_compiler import catalog
from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import BudgetError, CalibrationError, ModelError, ParseError, StructureError, unknown
from sparsify_compiler.fakes import fake_like, mode_of
from sparsify_compiler.passes.prune._layers import DEFAULT, Layer, LeftDense, Use, find_layers
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.prune.structures.unstructured import Unstructured
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Region, Stage, get_tensor, set_tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class MaskWeights(Pass):
    """Keep the weights of each layer that score highest, under a structure, within a budget.

    Matches    linear(x, weight, bias) and conv(x, weight, bias, ...), weight a parameter
    Rewrites   linear(x, weight * mask, bias), mask a bool buffer beside the weight
    Preserves  signature; quality is measured
    Paper      none: the frame that magnitude pruning (arXiv:1506.02626), Wanda (arXiv:2306.11695) and their like fill in

    score      a file of passes/prune/scores
    structure  which weights may be kept together: Unstructured(), NM(n=2, m=4), Block(rows=16, columns=1), FanIn(), or "2:4" and the like
    budget     a file of passes/prune/budgets: how the density is shared out over the layers
    density    kept / total over all selected layers; by default the structure's own (n/m), or else the user's budget
    targets    selectors of sites. All linear layers by default, output heads too: name a head in `ignore` to keep it dense.
               "ffn" and "attention" stand for the linear layers in them
    ignore     selectors of sites that stay dense
    on_misfit  what to do with a layer whose shape the structure does not divide: "error", or "skip" and say so
    seed       of a random score; by default the compile's own

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

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        for kind, name in (("score", self.score), ("budget", self.budget)):
            if name not in catalog.names(kind):
                raise unknown(kind, name, catalog.names(kind), where="mask_weights")
        if isinstance(self.structure, str):
            object.__setattr__(self, "structure", Structure.parse(self.structure))
        for selectors in ("targets", "ignore"):
            value = getattr(self, selectors)
            object.__setattr__(self, selectors, (value,) if isinstance(value, str) else tuple(value))
        if self.on_misfit not in ("error", "skip"):
            raise ParseError(f"on_misfit is 'error' or 'skip', not {self.on_misfit!r}", where="mask_weights")
        if self.density is not None and not 0 < self.density <= 1:
            raise BudgetError(f"a density lies above 0 and at most at 1, got {self.density}", where="mask_weights")

    def needs(self, program: Program) -> Mapping[str, frozenset[str]]:
        statistics = frozenset(self._statistics())
        layers = find_layers(program, self.targets, self.ignore)[0] if statistics else []
        return {use.site.path: statistics for layer in layers for use in layer.uses}

    def own_density(self) -> float | None:
        return self.density if self.density is not None else self._structure.density

    def run(self, program: Program, ctx: Context) -> Program:
        density = self._density(ctx)
        layers, left = find_layers(program, self.targets, self.ignore)
        if not layers and not left:
            ctx.miss("the model has no linear or convolution sites")
        fitting = [layer for layer in layers if self._fits(layer, density, left)]
        shapes = {layer.path: tuple(layer.weight.shape) for layer in fitting}
        densities = catalog.get("budget", self.budget)(shapes, density)
        for site in left:
            _leave_dense(site, program, ctx)
        for done, layer in enumerate(fitting):
            if densities[layer.path] >= 1:
                for use in layer.uses:
                    _leave_dense(LeftDense(use, "its budget is density 1"), program, ctx)
            elif not ctx.spend():
                break
            else:
                with _placed(layer):
                    mask = self._structure.mask(self._score(layer, ctx), densities[layer.path])
                self._apply(layer, mask, densities[layer.path], program)
            ctx.progress("mask weights", done + 1, len(fitting))
        return program

    @property
    def _structure(self) -> Structure:
        assert isinstance(self.structure, Structure)  # __post_init__ saw to it
        return self.structure

    def _density(self, ctx: Context) -> float:
        for density in (self.density, ctx.density, self._structure.density):
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

    def _statistics(self) -> tuple[str, ...]:
        names: tuple[str, ...] = sys.modules[catalog.get("score", self.score).__module__].STATISTICS
        return names

    def _score(self, layer: Layer, ctx: Context) -> Tensor:
        """The score of the layer's weight, summed over the sites that share it."""
        names = self._statistics()
        if names and ctx.statistics is None:
            raise CalibrationError(f"the score {self.score} needs statistics and there is no calibration", where=layer.path)
        total: Tensor | None = None
        for use in layer.uses:
            given = {name: ctx.statistics.get(use.site.path, name) for name in names} if ctx.statistics is not None else {}
            seed = zlib.crc32(f"{self.seed if self.seed is not None else ctx.seed} {use.site.path}".encode())
            score: Tensor = catalog.get("score", self.score)(layer.weight.detach(), given, seed)
            total = score if total is None else total + score
        assert total is not None
        return total

    def _apply(self, layer: Layer, mask: Tensor, budget: float, program: Program) -> None:
        products: dict[tuple[str, fx.Node], fx.Node] = {}
        for use in layer.uses:
            source = use.op.kwargs["weight"]
            assert isinstance(source, fx.Node)
            key = (use.region.path, source)
            if key not in products:
                products[key] = _multiply(use.region, source, mask, use.op.meta)
            use.op.kwargs = {**use.op.kwargs, "weight": products[key]}
            use.op.meta["site"] = use.site.path
            program.decisions[use.site.path] = row = _row(use, layer.weight)
            row.structure, row.density, row.budget = str(self.structure), float(mask.double().mean()), budget
            if use is not layer.uses[0]:
                row.dense_bytes, row.reason = None, f"shares the weight of {layer.path}"


@contextmanager
def _placed(layer: Layer) -> Iterator[None]:
    """Add the layer's path to a StructureError."""
    try:
        yield
    except StructureError as error:
        raise StructureError(error.what, where=f"{layer.path}, {error.where}", hint=error.hint) from error


def _multiply(region: Region, weight: fx.Node, mask: Tensor, meta: Mapping[str, Any]) -> fx.Node:
    """Insert weight * mask behind the weight's get_attr; the mask becomes a buffer beside the weight."""
    name, number = f"{weight.target}_mask", 0
    taken = {str(node.target) for node in region.graph.nodes if node.op == "get_attr"}
    while name in taken and get_tensor(region.module, name) is not mask:
        name, number = f"{weight.target}_mask{number + 1}", number + 1
    set_tensor(region.module, name, mask)
    about = {"by": "mask_weights"} | {key: meta[key] for key in ("path", "module") if key in meta}
    with region.graph.inserting_after(weight):
        mask_node = region.graph.get_attr(name)
    mask_node.meta = about | {"val": fake_like(mask, mode_of(region))}
    with region.graph.inserting_after(mask_node):
        product = region.graph.call_function(aten.mul.Tensor, (), {"self": weight, "other": mask_node})
    product.meta = about | {"val": fake_like(get_tensor(region.module, str(weight.target)), mode_of(region))}
    return product


def _leave_dense(left: LeftDense, program: Program, ctx: Context) -> None:
    """Write down why a site stays dense; what an earlier pass decided there stands."""
    use = left.use
    if left.chosen:
        ctx.miss(left.reason, use.site.path)
    source = use.op.kwargs.get("weight")
    weight = get_tensor(use.region.module, str(source.target)) if isinstance(source, fx.Node) and source.op == "get_attr" else None
    if use.site.path not in program.decisions:
        program.decisions[use.site.path] = replace(_row(use, weight), reason=f"stays dense: {left.reason}")


def _row(use: Use, weight: Tensor | None) -> Decision:
    if weight is None:
        return Decision(use.site.path, use.site.kind)
    size = weight.numel() * weight.element_size()
    return Decision(use.site.path, use.site.kind, tuple(weight.shape), str(weight.dtype).removeprefix("torch."), dense_bytes=size, bytes=size)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), (torch.randn(2, 16),)
