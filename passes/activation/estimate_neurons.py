"""Choose the neurons of each FFN by a low-rank copy of the FFN itself, before any of them is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.calibrate_rows import Place, collect_rows
from sparsify_compiler.errors import CalibrationError, ParseError
from sparsify_compiler.fold import evaluate, is_constant, put
from sparsify_compiler.named import Named
from sparsify_compiler.ops.select_ffn import ACTIVATIONS
from sparsify_compiler.passes.activation._copy import Activate, Copy, copied, expected
from sparsify_compiler.passes.activation._selection import Selection
from sparsify_compiler.passes.activation._units import Unit, in_groups, let_select, unit_of
from sparsify_compiler.passes.lower._selected_ffn import activation_of
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Region, Site, Stage
from sparsify_compiler.site_ffn import neurons_of
from sparsify_compiler.sites import op_paths
from sparsify_compiler.splice import insert_formula

KIND = ("ffn",)
ROLES = ("gate", "up")


@dataclass(frozen=True)
class EstimateNeurons(Pass):
    """Estimate, with gate and up at a low rank, how much each neuron of an FFN gives for the row, and skip the least: gate, up and down alike.

    Matches    linear(act(linear(x, gate)) * linear(x, up), down), and without a gate linear(act(linear(x, up)), down)
    Rewrites   linear(select(act(linear(x, gate)), limit, scores) * linear(x, up), down), scores the root of what act(gate x)² * (up x)² is expected
               to be, given A x for a thin A, times the length of the neuron's weights in down
    Preserves  signature; quality is measured
    Paper      none: Deja Vu's selection (arXiv:2310.17157) by a closed form instead of a trained network

    density   selected / all neurons of each FFN; by default the user's budget
    rank      rows of A. The copy costs rank / inputs of gate and up together
    selector  a file of passes/activation/selectors, of the scores
    targets   selectors of FFN sites; all by default
    ignore    selectors of such sites that compute everything

    Needs calibration batches, of more rows than an FFN has inputs. Sites that select already stay as they are.
    """

    density: float | None = None
    rank: int = 64
    selector: str = "threshold"
    targets: tuple[str, ...] = KIND
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        Named.parse("selector", self.selector)
        if self.rank < 1:
            raise ParseError(f"rank is 1 or more, got {self.rank}", where="estimate_neurons")
        self.take_selectors("targets", "ignore")
        self.check_density(self.density)

    def run(self, program: Program, ctx: Context) -> Program:
        density = self.density_of(ctx)
        found = {unit.path: (unit, projections, activations) for unit, projections, activations in self._units(program, ctx)}
        units = [unit for unit, _, _ in found.values()]
        if units and ctx.batches is None:
            raise CalibrationError("a copy is made on calibration rows, and there are none", where=units[0].path, hint="give calibration=batches")
        for group in in_groups(units, ctx.batches or ()):
            places = [place for unit in group for place in (unit.place(unit.source), unit.place(unit.made))]
            rows, _ = collect_rows(program, ctx.batches or (), places)
            for unit in group:
                if ctx.spend():
                    self._estimate(*found[unit.path], rows, density, program)
                ctx.progress("estimate neurons", units.index(unit) + 1, len(units))
        return program

    def _units(self, program: Program, ctx: Context) -> Iterator[tuple[Unit, list[fx.Node], list[Activate]]]:
        """What may be selected, with its projections and what each is activated by."""
        paths = op_paths(program)
        for site in self.ffns(program, ctx):
            region = program.regions[site.region]
            unit, projections = unit_of(region, site, paths), [region.node(site.roles[role]) for role in ROLES if role in site.roles]
            activations = _activations(region, site)
            stored = all(isinstance(one.kwargs["weight"], fx.Node) and is_constant(one.kwargs["weight"]) for one in projections)
            if isinstance(unit, str):
                ctx.miss(unit, site.path)
            elif not activations or site.facts["fused"] or not stored:
                ctx.miss("its projections are not stored one by one, or their activation is none that is known by name", site.path)
            else:
                yield unit, projections, activations

    def _estimate(self, unit: Unit, projections: Sequence[fx.Node], activations: Sequence[Activate], rows: Mapping[Place, Tensor], density: float,
                  program: Program) -> None:
        """Make the copy of one FFN, and let it select."""
        length = evaluate(unit.region, unit.op.kwargs["weight"]).float().square().sum(0).sqrt()  # type: ignore[arg-type]
        stored = [(evaluate(unit.region, one.kwargs["weight"]).float(), _bias(unit.region, one)) for one in projections]  # type: ignore[arg-type]
        importance = unit.importance(rows[unit.place(unit.made)], None)
        copy = copied(rows[unit.place(unit.source)], importance, stored, activations, length, self.rank, density)
        self._select(unit, copy, activations, density, program)

    def _select(self, unit: Unit, copy: Copy, activations: Sequence[Activate], density: float, program: Program) -> None:
        selection = Selection.of(self.selector, copy.scores, density)
        region, reader, by, dtype = unit.region, unit.reader, self.name(), unit.source.meta["val"].dtype

        def stored(value: Tensor, name: str, kind: torch.dtype) -> fx.Node:
            return put(region, reader, value.to(kind), name, (), reader.meta, by)

        parts = {"x": unit.source, **{name: stored(getattr(copy, name), f"copy_{name}", dtype) for name in ("first", "second", "second_bias")},
                 **{name: stored(getattr(copy, name), f"copy_{name}", torch.float32) for name in ("rest", "length")}}
        scores = insert_formula(region, reader, partial(expected, activations=activations), parts, by)
        let_select(unit, selection, by, scores, density, copy.recall, program)


def _activations(region: Region, site: Site) -> list[Activate]:
    """Of gate and up, or of up alone; empty where one is not known."""
    name = activation_of(neurons_of(region, site))[1]
    if name not in ACTIVATIONS:
        return []
    if not site.facts["gated"]:
        return [ACTIVATIONS[name]]
    return [ACTIVATIONS[name], ACTIVATIONS["relu"] if "up_activation" in site.roles else _same]


def _same(x: Tensor) -> Tensor:
    return x


def _bias(region: Region, linear: fx.Node) -> Tensor | None:
    found: Any = linear.kwargs.get("bias")
    return None if found is None else evaluate(region, found).float()


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A gated FFN."""
    from sparsify_compiler.passes.activation.select_neurons import GatedFfn

    torch.manual_seed(0)
    return GatedFfn(16, 32).eval(), (torch.randn(64, 16),)
