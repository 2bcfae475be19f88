"""Choose the neurons of each FFN, and the heads of each attention, by a small network, before any of them is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.calibrate_rows import Place, collect_rows
from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import CalibrationError, ParseError
from sparsify_compiler.fold import evaluate, is_constant, put
from sparsify_compiler.named import Named
from sparsify_compiler.normal_form_edit import only_user
from sparsify_compiler.ops import select
from sparsify_compiler.passes.activation._predictor import Predictor, fit, hidden, margins, scored
from sparsify_compiler.passes.activation._selection import Selection
from sparsify_compiler.passes.lower._predicted import BY
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Region, Site, Stage
from sparsify_compiler.site_ffn import neurons_of
from sparsify_compiler.sites import chosen_sites, find_sites
from sparsify_compiler.splice import insert_formula

KINDS = ("ffn", "attention")
MAX_BYTES = 1 << 29  # of rows that are held at one time
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

    def own_density(self) -> float | None:
        return self.density

    def run(self, program: Program, ctx: Context) -> Program:
        density = self.density_of(ctx)
        units = list(self._units(program, ctx))
        if units and ctx.batches is None:
            raise CalibrationError("a predictor is trained, and there is no calibration", where=units[0].path, hint="give calibration=batches")
        if self.source == "model" and len({unit.region.path for unit in units}) > 1:
            ctx.miss("the model was captured in regions, and one predictor cannot see them all: source='site' can")
            return program
        shared = units[0].source if units and self.source == "model" else None
        for group in self._groups(units, ctx):
            group = [unit for unit in group if ctx.spend()]
            for unit, predictor in zip(group, self._trained(group, program, density, shared, ctx), strict=True):
                self._select(unit, predictor, density, shared, program)
        return program

    def _units(self, program: Program, ctx: Context) -> Iterator[_Unit]:
        """What may be selected, in the order of execution."""
        sites = chosen_sites(program, KINDS, self.targets, self.ignore)
        if not sites:
            ctx.miss("the model has no FFN")
        paths = {(site.region, site.roles["op"]): site.path for site in find_sites(program, ("linear",))}
        for site in sites:
            made = _unit(program.regions[site.region], site, paths)
            if isinstance(made, str):
                ctx.miss(made, site.path)
            else:
                yield made

    def _groups(self, units: Sequence[_Unit], ctx: Context) -> Iterator[list[_Unit]]:
        """Units whose rows fit into memory together; with one predictor for all, all of them."""
        group: list[_Unit] = []
        for unit in units:
            if self.source == "site" and group and (len(group) + 1) * unit.bytes_a_row * _rows_of(ctx.batches or ()) > MAX_BYTES:
                yield group
                group = []
            group.append(unit)
        if group:
            yield group

    def _trained(self, group: Sequence[_Unit], program: Program, density: float, shared: fx.Node | None, ctx: Context) -> Iterator[Predictor]:
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

    def _select(self, unit: _Unit, predictor: Predictor, density: float, shared: fx.Node | None, program: Program) -> None:
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
        chosen = selection.insert(region, reader, unit.value, by, scores)
        reader.replace_input_with(unit.value, chosen)
        row, unit.op.meta["site"] = program.decisions.setdefault(unit.path, _row(unit)), unit.path
        row.structure, row.density, row.budget = f"{unit.what} {BY}", selection.found, density
        row.reason = f"the predictor finds {predictor.recall:.0%} of the {unit.what} that matter most"


@dataclass(frozen=True)
class _Unit:
    """One site. `value`, read by `reader`, is selected in units of `size` numbers, by a prediction from `source`; `op` reads `made`."""

    path: str
    region: Region
    what: str
    source: fx.Node
    value: fx.Node
    reader: fx.Node
    made: fx.Node
    op: fx.Node
    size: int

    def place(self, node: fx.Node) -> Place:
        return self.region.path, node.name

    @property
    def bytes_a_row(self) -> int:
        return sum(4 * int(node.meta["val"].shape[-1]) for node in (self.source, self.made))

    def importance(self, rows: Tensor, slopes: Tensor | None) -> Tensor:
        """[rows, units]."""
        if slopes is not None:
            return self._units(rows * slopes).sum(-1).abs()
        length = evaluate(self.region, self.op.kwargs["weight"]).float().square().sum(0).sqrt()  # type: ignore[arg-type]
        return self._units(rows * length).square().sum(-1).sqrt()

    def _units(self, rows: Tensor) -> Tensor:
        return rows.view(rows.shape[0], -1, self.size)


def _unit(region: Region, site: Site, paths: dict[tuple[str, str], str]) -> _Unit | str:
    role = "down" if site.kind == "ffn" else "out"
    if role not in site.roles or ("q" not in site.roles and site.kind == "attention"):
        return "what it reads or what reads it is no linear"
    op, first = region.node(site.roles[role]), region.node(site.roles["up" if site.kind == "ffn" else "q"])
    made: Any = op.kwargs["input"]
    source: Any = first.kwargs["input"]
    weight = op.kwargs["weight"]
    if not isinstance(weight, fx.Node) or not is_constant(weight):
        return "its last projection has no stored weight"
    value = neurons_of(region, site) if site.kind == "ffn" else made
    reader, size = only_user(value), 1
    if site.kind == "attention":
        heads, size = int(site.facts["heads"]), int(site.facts["head_dim"])
        if heads * size != int(made.meta["val"].shape[-1]) or size == 0:
            return "its heads are not next to each other"
    if reader is None:
        return f"its {_what(site)} have {len(value.users)} readers"
    if value.target is select.op or reader.target is select.op:
        return f"its {_what(site)} are selected already"
    return _Unit(paths[site.region, site.roles[role]], region, _what(site), source, value, reader, made, op, size)


def _what(site: Site) -> str:
    return "neurons" if site.kind == "ffn" else "heads"


def _of_one(x: Tensor, wanted: Sequence[Tensor], rank: int, epochs: int, seed: int) -> Iterator[Predictor]:
    """Predictors with one first layer, for units of several widths: the narrower are filled up for training, and cut again."""
    widest = max(labels.shape[1] for labels in wanted)
    full = torch.stack([nn.functional.pad(labels, (0, widest - labels.shape[1]), value=-1) for labels in wanted])
    for labels, made in zip(wanted, fit(x, full, rank, epochs, seed), strict=True):
        width = labels.shape[1]
        yield Predictor(made.first, made.first_bias, made.second[:width], made.second_bias[:width], made.scores[:, :width], made.recall)


def _rows_of(batches: Sequence[Any]) -> int:
    """About how many rows these batches have: the numbers of their largest integer tensor, or the rows of their largest other one."""
    total = 0
    for batch in batches:
        tensors = [value for value in torch.utils._pytree.tree_leaves(batch) if isinstance(value, Tensor)]
        total += max((t.numel() if not t.is_floating_point() else t.numel() // max(int(t.shape[-1]), 1) for t in tensors if t.dim()), default=1)
    return total


def _row(unit: _Unit) -> Decision:
    weight = evaluate(unit.region, unit.op.kwargs["weight"])  # type: ignore[arg-type]
    size = weight.numel() * weight.element_size()
    return Decision(unit.path, "linear", tuple(weight.shape), str(weight.dtype).removeprefix("torch."), dense_bytes=size, bytes=size)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A gated FFN."""
    from sparsify_compiler.passes.activation.select_neurons import GatedFfn

    torch.manual_seed(0)
    return GatedFfn(16, 32).eval(), (torch.randn(40, 16),)
