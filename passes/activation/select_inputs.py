"""Let each layer read the weights of those inputs only that matter in the row at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.normal_form_edit import aten, insert
from sparsify_compiler.ops import select
from sparsify_compiler.passes.activation._evidence import InputEvidence
from sparsify_compiler.passes.activation._selection import exact
from sparsify_compiler.passes.activation._trials import BlockTrials
from sparsify_compiler.passes.activation.repairs._base import Repaired, Skipping
from sparsify_compiler.passes.prune._layers import DEFAULT, Layer, Use, find_layers
from sparsify_compiler.passes.prune._low_rank import add_low_rank
from sparsify_compiler.passes.prune.budgets._base import told
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Stage
from sparsify_compiler.work import Work


@dataclass(frozen=True)
class SelectInputs(Pass):
    """Keep the inputs of each layer that score highest in the row at hand, and put 0, or their mean, in the place of the others.

    Matches    linear(x, weight, bias), weight a parameter
    Rewrites   linear(select(x, limit, scale, center), weight, bias): x where |x - center| * scale reaches the limit, the centre elsewhere; with a
               repair + linear(linear(x - select(x, ...), reads), writes)
    Preserves  signature; quality is measured
    Paper      none: the frame that TEAL (arXiv:2408.14690), WINA (arXiv:2505.19427), CHESS (arXiv:2409.01366) and their like fill in

    scorer    a file of passes/activation/scorers: what |x| is multiplied with; with options of its own in parentheses
    selector  a file of passes/activation/selectors: how the scores of a row become a limit
    budget    a file of passes/activation/budgets: how the density is shared out over the layers
    density   weights read / all weights, over all selected layers; by default the user's budget. 1 selects everything
    repair    a file of passes/activation/repairs: what stands in for the inputs that are skipped, out of the layer's density; with options of its own
    center    what stands for an input that is skipped: "zero", or "mean", its mean over the calibration, which costs nothing at run time
    targets   selectors of sites, as in mask_weights: "linear", "ffn", "attention", "ffn:down", paths and patterns
    ignore    selectors of sites that read all of their inputs
    straight_through  in training, give an input that was not selected the gradient too, as if it had been

    A NaN is always selected, so it reaches the output. Layers whose inputs are selected already stay as they are. Needs calibration.
    """

    scorer: str = "magnitude"
    selector: str = "threshold"
    budget: str = "uniform"
    density: float | None = None
    repair: str = "none"
    center: Literal["zero", "mean"] = "zero"
    targets: tuple[str, ...] = DEFAULT
    ignore: tuple[str, ...] = ()
    straight_through: bool = False

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        for kind, name in (("scorer", self.scorer), ("selector", self.selector), ("input budget", self.budget), ("input repair", self.repair)):
            Named.parse(kind, name)
        if self.center not in ("zero", "mean"):
            raise ParseError(f"center is 'zero' or 'mean', not {self.center!r}", where="select_inputs")
        self.take_selectors("targets", "ignore")
        self.check_density(self.density)

    def needs(self, program: Program) -> Mapping[str, frozenset[str]]:
        names = {"input_rows", *Named.parse("scorer", self.scorer).statistics, *Named.parse("input budget", self.budget).statistics}
        names |= {"input_mean"} if self.center == "mean" else set()
        return {use.site.path: frozenset(names) for layer in self._layers(program)[0] for use in layer.uses}

    def own_density(self) -> float | None:
        return self.density if self.density is not None else told(Named.parse("input budget", self.budget).options)

    def work(self, shape: tuple[int, int], rows: int, density: float, dtype: str, between: int) -> tuple[Work, ...]:
        return (Work.make("select_linear", dtype, between, M=rows, N=shape[0], K=shape[1], density=density),)

    def run(self, program: Program, ctx: Context) -> Program:
        density = 1.0 if exact(Named.parse("selector", self.selector)) else self.density_of(ctx)
        layers, left = self._layers(program)
        for site, why in left:
            ctx.miss(why, site)
        if not layers:
            if not left:
                ctx.miss("the model has no linear sites")
            return program
        evidence = self._evidence(program, layers, ctx)
        costs = {layer.path: layer.weight.numel() for layer in layers}
        densities = Named.parse("input budget", self.budget)(costs, density, evidence)
        for done, layer in enumerate(layers):
            if not ctx.spend():
                break
            self._select(layer, densities[layer.path], evidence, program)
            ctx.progress("select inputs", done + 1, len(layers))
        return program

    def _layers(self, program: Program) -> tuple[list[Layer], list[tuple[str, str]]]:
        """The layers to act on, and the sites that are left alone with the reason."""
        layers, left = find_layers(program, self.targets, self.ignore)
        reasons = [(one.use.site.path, one.reason) for one in left if one.chosen]
        fit = []
        for layer in layers:
            why = next((why for use in layer.uses if (why := _unfit(use)) is not None), None)
            if why is None:
                fit.append(layer)
            else:
                reasons.append((layer.path, why))
        return fit, reasons

    def _evidence(self, program: Program, layers: list[Layer], ctx: Context) -> InputEvidence:
        scorer = Named.parse("scorer", self.scorer)
        known = {layer.path: layer for layer in layers}
        centers: dict[str, Tensor | None] = {}
        scales: dict[str, Tensor | None] = {}
        evidence = InputEvidence(known, ctx.statistics, scales, centers, self.selector, BlockTrials(program, ctx.batches))
        for site, layer in known.items():
            centers[site] = evidence.statistic(site, "input_mean") if self.center == "mean" else None
            scales[site] = scorer(layer.weight, {name: evidence.statistic(site, name) for name in scorer.statistics})
        return evidence

    def _select(self, layer: Layer, density: float, evidence: InputEvidence, program: Program) -> None:
        """Put the selection in front of every use of one layer, and note it in the report."""
        path = layer.path
        select_at = evidence.selection(path)
        rows = evidence.statistic(path, "input_rows")
        skipping = Skipping(layer.weight, lambda density: rows - select_at(density)(rows))
        repaired = Repaired(density) if density >= 1 else Named.parse("input repair", self.repair)(skipping, density)
        selection = select_at(repaired.density)
        for use in layer.uses:
            chosen = selection.insert(use.region, use.op, use.op.kwargs["input"], self.name(), straight_through=self.straight_through)
            use.op.kwargs = {**use.op.kwargs, "input": chosen}
            row = program.decisions.setdefault(use.site.path, Decision.of(use.site.path, "linear", layer.weight))
            row.structure, row.density, row.budget = f"inputs by {selection.selector.name}", selection.found, density
            if repaired.low_rank is not None:
                self._add_low_rank(use, chosen, layer, repaired.low_rank)
                row.structure += f" + rank {len(repaired.low_rank[0])}"
            use.op.meta["site"] = use.site.path


    def _add_low_rank(self, use: Use, chosen: fx.Node, layer: Layer, factors: tuple[Tensor, Tensor]) -> None:
        """Beside the layer: what it skips, through a few directions."""
        skipped = insert(use.op, aten.sub.Tensor, self=chosen.kwargs["x"], other=chosen)
        skipped.meta["by"] = self.name()
        reads, writes = (factor.to(layer.weight.dtype) for factor in factors)
        add_low_rank(use.region, use.op, use.op.kwargs["weight"], (reads, writes), skipped, self.name())  # type: ignore[arg-type]


def _unfit(use: Use) -> str | None:
    source = use.op.kwargs.get("input")
    if use.site.kind != "linear":
        return "only the inputs of linear layers are selected"
    if isinstance(source, fx.Node) and source.target is select.op:
        return "its inputs are selected already"
    return None if use.op.kwargs["weight"].meta["val"].dim() == 2 and layer_width(use) > 0 else "it has no inputs"  # type: ignore[union-attr]


def layer_width(use: Use) -> int:
    """Number of inputs of a linear layer."""
    return int(use.op.kwargs["weight"].meta["val"].shape[1])  # type: ignore[union-attr]


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).eval(), (torch.randn(6, 16),)
