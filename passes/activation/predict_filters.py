"""Choose the filters of each convolution for the image at hand, by a small network that learns in training what they give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from sparsify_compiler.errors import ParseError
from sparsify_compiler.normal_form_edit import aten, insert
from sparsify_compiler.passes.train._penalty import Penalty, check_weight
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, Site, get_tensor
from sparsify_compiler.sites import chosen_sites, fitting_ops
from sparsify_compiler.splice import insert_formula
from sparsify_compiler.stored import beside, read_stored, reads
from sparsify_compiler.training import META, Marked, Part, TrainingPass

OPEN = 4.0  # the bias of a predictor at first: every filter is kept


@dataclass(frozen=True)
class PredictFilters(TrainingPass):
    """Predict for every image which filters of a convolution matter, and give zeros for the others; in training, teach that by their own maps.

    Matches    conv(x, w, b), an input and an output with channels of images
    Rewrites   where(linear(amax(x), weights, bias) < 0, 0, conv(x, w, b)), amax over the places: at first every filter is kept
    Preserves  values
    Paper      Fire Together Wire Together, Elkerdawy et al., arXiv:2110.08232

    mass      a filter matters for an image where it is among the fewest whose maps (what is above 0) hold this share of the sum of all maps
    weight    of the binary cross entropy of the predictions in the loss, a mean over the convolutions
    schedule  a file of passes/train/schedules, of the number of steps, which multiplies the weight
    least     convolutions of fewer filters compute all of them
    targets   selectors of convolution sites; all by default
    ignore    selectors of convolution sites

    How many filters an image gets is its own; what it costs follows from `mass` before any training. Predictions learn by their own loss alone, and
    the network by its loss, through the filters that are kept. Fold batch norms first: maps are taken behind them. No kernel leaves the filters
    out yet: what is saved are multiplications that an engine may skip.
    """

    mass: float = 0.9
    weight: float = 1.0
    schedule: str = "constant"
    least: int = 8
    targets: tuple[str, ...] = ("conv",)
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_weight(self.weight, self.schedule, "predict_filters")
        if not 0 < self.mass <= 1 or self.least < 1:
            raise ParseError(f"mass lies above 0 and at most at 1, least at 1 or more: {self.mass}, {self.least}", where="predict_filters")
        self.take_selectors("targets", "ignore")

    def run(self, program: Program, ctx: Context) -> Program:
        sites = chosen_sites(program, ("conv",), self.targets, self.ignore)
        for site, region, conv in fitting_ops(program, sites, ctx, "convolution", self._unfit):
            self._predict(region, conv, site)
        return program

    def _unfit(self, region: Region, conv: fx.Node) -> str | None:
        value, weight = conv.meta["val"], conv.kwargs.get("weight")
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return "its weight is computed, or has a mask"
        if value.dim() != weight.meta["val"].dim():
            return "its input is no batch"
        if value.shape[1] < self.least:
            return f"it has {value.shape[1]} filters, fewer than least={self.least}"
        return "its filters are predicted already" if reads(region, beside(str(weight.target), "predictor_weight")) else None

    def _predict(self, region: Region, conv: fx.Node, site: Site) -> None:
        name = str(conv.kwargs["weight"].target)  # type: ignore[union-attr]
        weight, x = get_tensor(region.module, name), conv.kwargs["input"]
        assert isinstance(x, fx.Node)
        rows, columns = weight.shape[0], int(x.meta["val"].shape[1])
        parts = {"weights": weight.new_zeros(rows, columns), "bias": weight.new_full((rows,), OPEN)}
        after, users, before = conv.next, list(conv.users), set(region.graph.nodes)
        stored = {key: read_stored(region, after, beside(name, f"predictor_{'weight' if key == 'weights' else key}"), self.name(),
                                   nn.Parameter(tensor.detach())) for key, tensor in parts.items()}
        alone = insert(after, aten.detach.default, self=x)  # a formula's own would be taken for a no-op: its values are
        logits = insert_formula(region, after, _logits, {"x": alone, **stored}, self.name())
        kept = insert_formula(region, after, _kept, {"y": conv, "logits": logits}, self.name())
        for node in [node for node in region.graph.nodes if node not in before]:
            node.meta |= {"by": self.name(), "path": f"{site.path}.predictor".strip("."), "module": conv.meta.get("module")}
        for node in (conv, logits):
            node.meta[META] = (*node.meta.get(META, ()), (self, site.path))
        for user in users:
            user.replace_input_with(conv, kept)

    def part(self, marked: Sequence[Marked]) -> Part:
        return Penalty(self.weight, self.schedule, partial(_terms, self.mass, tuple(marked)))


def _logits(x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """[batch, filters]."""
    return functional.linear(x.amax(tuple(range(2, x.dim()))), weights, bias)


def _kept(y: Tensor, logits: Tensor) -> Tensor:
    for _ in range(y.dim() - 2):
        logits = logits.unsqueeze(-1)
    return torch.where(logits < 0, torch.zeros_like(y), y)


def matter(maps: Tensor, mass: float) -> Tensor:
    """bool [batch, filters]: the fewest filters that hold this share of what all maps [batch, filters, ...] sum up to above 0."""
    sums = maps.relu().flatten(2).sum(2).double()
    ranked = sums.sort(1, descending=True)
    before = ranked.values.cumsum(1) - ranked.values
    enough = before < mass * ranked.values.sum(1, keepdim=True)
    return torch.zeros_like(sums, dtype=torch.bool).scatter(1, ranked.indices, enough)


def _terms(mass: float, marked: Sequence[Marked]) -> Iterator[Tensor]:
    """One for each convolution: the maps, and what was predicted of them."""
    by_path: dict[str, list[Tensor]] = {}
    for one in marked:
        if one.value is not None:
            by_path.setdefault(one.path, []).append(one.value)
    for maps, logits in (pair for pair in by_path.values() if len(pair) == 2):
        yield functional.binary_cross_entropy_with_logits(logits.float(), matter(maps.detach(), mass).float())


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two convolutions."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3)).eval(), (torch.randn(2, 3, 8, 8),)
