"""Choose the neurons of each FFN, and the heads of each attention, by a small network, before any of them is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.calibrate_rows import collect_rows
from sparsify_compiler.errors import CalibrationError, ParseError
from sparsify_compiler.fold import put
from sparsify_compiler.named import Named
from sparsify_compiler.passes.activation._predictor import Predictor, fit, hidden, margins, scored
from sparsify_compiler.passes.activation._selection import Selection
from sparsify_compiler.passes.activation._units import Unit, in_groups, let_select, unit_of
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Stage
from sparsify_compiler.sites import chosen_sites, op_paths
from sparsify_compiler.splice import insert_formula

KINDS = ("ffn", "attention")
FROM, CRITERIA = ("site", "model"), ("magnitude", "gradient")


@dataclass(frozen=True)
class PredictNeurons(Pass):
    """Predict from what an FFN reads which of its neurons matter for the row, and skip the others: gate, up and down alike; heads likewise.

    Matches    linear(act(linear(x, gate)) * linear(x, up), down), the same without a gate, and linear(attention(x), out)
    Rewrites   linear(select(act(linear(x, gate)), limit, scores) * linear(x, up), down) with scores = sigmoid(B relu(A x + a) + b), one a neuron;
               linear(select(attention(x), limit, scores), out), one a head
    Preserves  signature; quality is measured
    Paper      Deja Vu, Liu et al., arXiv:2310.17157; ShadowLLM, Akhauri et al., arXiv:2406.16635

    density    selected / all neurons (or heads) of each site; by default the user's budget
    source     what is predicted from: "site", the site's own input, with a network each; or "model", what the first FFN reads, with one for all
    criterion  what matters: "magnitude", of what a neuron gives times the length of the weights that read it; or "gradient", that times the
               gradient of the loss by it
    rank       width of the network's hidden layer
    epochs     of its training, on the rows of calibration
    selector   a file of passes/activation/selectors, of the scores
    targets    selectors of FFN and attention sites; FFNs by default
    ignore     selectors of such sites that compute everything

    Needs calibration batches, of some thousand rows: seven of eight train, the others measure. Sites that select already stay as they are.
    """

    density: float | None = None
    source: Literal["site", "model"] = "site"
    criterion: Literal["magnitude", "gradient"] = "magnitude"
    rank: int = 128
    epochs: int = 6
    selector: str = "threshold"
    targets: tuple[str, ...] = ("ffn",)
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        Named.parse("selector", self.selector)
        for value, known, name in ((self.source, FROM, "source"), (self.criterion, CRITERIA, "criterion")):
            if value not in known:
                raise ParseError(f"{name} is one of {known}, not {value!r}", where="predict_neurons")
        if self.rank < 1 or self.epochs < 1:
            raise ParseError(f"rank and epochs are 1 or more, got {self.rank} and {self.epochs}", where="predict_neurons")
        self.take_selectors("targets", "ignore")
        self.check_density(self.density)

    def run(self, program: Program, ctx: Context) -> Program:
        density = self.density_of(ctx)
        units = list(self._units(program, ctx))
        if units and ctx.batches is None:
            raise CalibrationError("a predictor is trained, and there is no calibration", where=units[0].path, hint="give calibration=batches")
        if self.source == "model" and len({unit.region.path for unit in units}) > 1:
            ctx.miss("the model was captured in regions, and one predictor cannot see them all: source='site' can")
            return program
        shared = units[0].source if units and self.source == "model" else None
        for group in [units] if shared is not None else in_groups(units, ctx.batches or ()):
            group = [unit for unit in group if ctx.spend()]
            for unit, predictor in zip(group, self._trained(group, program, density, shared, ctx), strict=True):
                self._select(unit, predictor, density, shared, program)
        return program

    def _units(self, program: Program, ctx: Context) -> Iterator[Unit]:
        """What may be selected, in the order of execution."""
        sites = chosen_sites(program, KINDS, self.targets, self.ignore)
        if not sites:
            ctx.miss("the model has no FFN")
        paths = op_paths(program)
        for site in sites:
            made = unit_of(program.regions[site.region], site, paths)
            if isinstance(made, str):
                ctx.miss(made, site.path)
            else:
                yield made

    def _trained(self, group: Sequence[Unit], program: Program, density: float, shared: fx.Node | None, ctx: Context) -> Iterator[Predictor]:
        """A predictor for each unit."""
        inputs = [unit.place(shared or unit.source) for unit in group]
        made = [unit.place(unit.made) for unit in group]
        rows, slopes = collect_rows(program, ctx.batches or (), [*inputs, *made], made if self.criterion == "gradient" else ())
        wanted = []
        for unit, place in zip(group, made, strict=True):
            importance = unit.importance(rows[place], slopes.get(place))
            if importance.shape[0] != rows[inputs[0]].shape[0]:
                raise CalibrationError("its rows are not those of the predictor's input", where=unit.path, hint="source='site', or leave it out")
            wanted.append(margins(importance, density))
        if shared is None:
            for done, (place, labels) in enumerate(zip(inputs, wanted, strict=True)):
                yield fit(rows[place], labels[None], self.rank, self.epochs, ctx.seed)[0]
                ctx.progress("train predictors", done + 1, len(group))
        else:
            yield from _of_one(rows[inputs[0]], wanted, self.rank, self.epochs, ctx.seed)

    def _select(self, unit: Unit, predictor: Predictor, density: float, shared: fx.Node | None, program: Program) -> None:
        selection = Selection.of(self.selector, predictor.scores, density)
        region, reader, by = unit.region, unit.reader, self.name()
        source = shared or unit.source
        dtype = source.meta["val"].dtype

        def stored(before: fx.Node, value: Tensor, name: str) -> fx.Node:
            return put(region, before, value.to(dtype), name, (), before.meta, by)

        known = next((node for node in region.graph.nodes if shared is not None and node.meta.get("predictor") == source.name), None)
        if known is None:
            first = source.next if shared is not None else reader
            known = insert_formula(region, first, hidden, {"x": source, "first": stored(first, predictor.first, "predictor_first"),
                                                           "first_bias": stored(first, predictor.first_bias, "predictor_bias")}, by)
            known.meta["predictor"] = source.name
        parts = {"second": stored(reader, predictor.second, "predictor_second"),
                 "second_bias": stored(reader, predictor.second_bias, "predictor_odds")}

        def spread(inner: Tensor, second: Tensor, second_bias: Tensor) -> Tensor:
            scores = scored(inner, second, second_bias)
            return scores if unit.size == 1 else scores.unsqueeze(-1).expand(*scores.shape, unit.size).flatten(-2)

        scores = insert_formula(region, reader, spread, {"inner": known, **parts}, by)
        let_select(unit, selection, by, scores, density, predictor.recall, program)


def _of_one(x: Tensor, wanted: Sequence[Tensor], rank: int, epochs: int, seed: int) -> Iterator[Predictor]:
    """Predictors with one first layer, for units of several widths: the narrower are filled up for training, and cut again."""
    widest = max(labels.shape[1] for labels in wanted)
    full = torch.stack([nn.functional.pad(labels, (0, widest - labels.shape[1]), value=-1) for labels in wanted])
    for labels, made in zip(wanted, fit(x, full, rank, epochs, seed), strict=True):
        width = labels.shape[1]
        yield Predictor(made.first, made.first_bias, made.second[:width], made.second_bias[:width], made.scores[:, :width], made.recall)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A gated FFN."""
    from sparsify_compiler.passes.activation.select_neurons import GatedFfn

    torch.manual_seed(0)
    return GatedFfn(16, 32).eval(), (torch.randn(40, 16),)
