"""Let each FFN compute those of its neurons only whose gate is open in the row at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.fold import evaluate, is_constant
from sparsify_compiler.named import Named
from sparsify_compiler.ops import select
from sparsify_compiler.passes.activation._selection import Selection, exact
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Region, Site, Stage
from sparsify_compiler.site_ffn import neurons_of
from sparsify_compiler.sites import chosen_sites, find_sites, op_paths

KIND = ("ffn",)


@dataclass(frozen=True)
class SelectNeurons(Pass):
    """Keep the neurons of each FFN whose activation scores highest in the row at hand; of the others neither up nor down is needed.

    Matches    linear(act(linear(x, gate)) * linear(x, up), down), and without a gate linear(act(linear(x, up)), down)
    Rewrites   linear(select(act(linear(x, gate)), limit, scale) * linear(x, up), down), and linear(select(act(linear(x, up)), ...), down)
    Preserves  signature; quality is measured
    Paper      none: the frame that CATS (arXiv:2404.08763) and CHESS (arXiv:2409.01366) fill in

    scorer    a file of passes/activation/scorers, of what the activation gives and the down projection, whose inputs the neurons are
    selector  a file of passes/activation/selectors
    density   selected / all neurons, the same in every FFN; by default the user's budget. The selector "nonzero" needs none: it skips what ReLU and
              its kin have made zero, which changes nothing but the reads
    targets   selectors of FFN sites; all by default
    ignore    selectors of FFN sites that compute all of their neurons

    FFNs that select already stay as they are; what they select is measured. Needs calibration.
    """

    scorer: str = "magnitude"
    selector: str = "threshold"
    density: float | None = None
    targets: tuple[str, ...] = KIND
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        for kind, name in (("scorer", self.scorer), ("selector", self.selector)):
            Named.parse(kind, name)
        self.take_selectors("targets", "ignore")
        self.check_density(self.density)

    def needs(self, program: Program) -> Mapping[str, frozenset[str]]:
        names = frozenset({"neuron_rows", *Named.parse("scorer", self.scorer).statistics} - {"input_rows"})
        downs = {(site.region, site.roles["down"]) for site in self._sites(program)}
        return {site.path: names for site in find_sites(program, ("linear",)) if (site.region, site.roles["op"]) in downs}

    def run(self, program: Program, ctx: Context) -> Program:
        density = 1.0 if exact(Named.parse("selector", self.selector)) else self.density_of(ctx)
        sites = self.ffns(program, ctx)
        paths = op_paths(program)
        for done, site in enumerate(sites):
            region = program.regions[site.region]
            why = _unfit(region, site)
            path = paths[site.region, site.roles["down"]]
            if why is not None:
                ctx.miss(why, site.path)
                self._measure(region, site, path, program, ctx)
            elif ctx.spend():
                self._select(region, site, path, density, program, ctx)
            ctx.progress("select neurons", done + 1, len(sites))
        return program

    def _sites(self, program: Program) -> list[Site]:
        return chosen_sites(program, KIND, self.targets, self.ignore)

    def _select(self, region: Region, site: Site, path: str, density: float, program: Program, ctx: Context) -> None:
        if ctx.statistics is None:
            raise CalibrationError("needs the statistic neuron_rows and there is no calibration", where=site.path, hint="give calibration=batches")
        down, value, scorer = region.node(site.roles["down"]), neurons_of(region, site), Named.parse("scorer", self.scorer)
        rows = ctx.statistics.get(path, "neuron_rows")
        known = {name: rows if name == "input_rows" else ctx.statistics.get(path, name) for name in scorer.statistics}
        weight = evaluate(region, down.kwargs["weight"])  # type: ignore[arg-type]
        scale = scorer(weight, known)
        selection = Selection.of(self.selector, rows.abs() if scale is None else rows.abs() * scale, density, scale)
        reader = next(iter(value.users))
        chosen = selection.insert(region, reader, value, self.name())
        reader.replace_input_with(value, chosen)
        row, down.meta["site"] = program.decisions.setdefault(path, Decision.of(path, "linear", weight)), path
        row.structure, row.density, row.budget = f"neurons by {selection.selector.name}", selection.found, density


    def _measure(self, region: Region, site: Site, path: str, program: Program, ctx: Context) -> None:
        """Note what an FFN selects that comes with a selection of its own (FATReLU)."""
        down = region.node(site.roles["down"])
        if neurons_of(region, site).target is select.op and path not in program.decisions and ctx.statistics is not None:
            row = program.decisions[path] = Decision.of(path, "linear", evaluate(region, down.kwargs["weight"]))  # type: ignore[arg-type]
            down.meta["site"] = path
            row.structure, row.density = "neurons by threshold", float((ctx.statistics.get(path, "neuron_rows") != 0).float().mean())


def _unfit(region: Region, site: Site) -> str | None:
    value = neurons_of(region, site)
    if len(value.users) != 1:
        return f"its neurons have {len(value.users)} readers"
    reader = next(iter(value.users))
    if value.target is select.op or reader.target is select.op:
        return "its neurons are selected already"
    weight = region.node(site.roles["down"]).kwargs["weight"]
    return None if isinstance(weight, fx.Node) and is_constant(weight) else "its down projection has no stored weight"


class GatedFfn(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, inputs: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(inputs, hidden, bias), nn.Linear(inputs, hidden, bias), nn.Linear(hidden, inputs, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """One gated FFN."""
    torch.manual_seed(0)
    return GatedFfn(16, 32).eval(), (torch.randn(6, 16),)
