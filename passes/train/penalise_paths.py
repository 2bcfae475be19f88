"""Add a term to the training loss that draws a text's way through all mixtures to a window which its time says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sparsify_compiler.errors import ParseError
from sparsify_compiler.normal_form_edit import same_size
from sparsify_compiler.passes.moe._routing import Routing, mixtures
from sparsify_compiler.passes.train._penalty import Penalty, check_weight
from sparsify_compiler.passes.train.router_losses._base import counts
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Site
from sparsify_compiler.training import Marked, Part, TrainingPass

TIME = "the time"  # the path under which a model's input is marked: none of a module


@dataclass(frozen=True)
class PenalisePaths(TrainingPass):
    """In training, add how far the probabilities of all routers together are from a window over all experts, which moves with a text's time.

    Matches    experts_ffn(x, choice of scores, ...), in a model that is one graph and is given the time of each text
    Rewrites   nothing: it marks what hook.loss() of sc.attach() is made of
    Preserves  values
    Paper      Switch-DiT, Park et al., arXiv:2403.09176, whose diffusion prior loss this is; windows as in DTR, Park et al., arXiv:2310.07138

    given     the input of the model that holds the times, [texts], by its name
    most      the largest time; the window begins at the first expert at 0, and ends at the last one there
    bend      the window moves with (time / most) to this power
    weight    what the loss is multiplied with
    schedule  a file of passes/train/schedules, of the number of steps, which multiplies the weight

    Texts of near times so come to share experts, those of far times to have others. At which place of the window an expert stands is found anew in
    each step, by matching with what the texts of the batch choose, which many different times make steady. The paper's program matches over all
    times that there are.
    """

    given: str = "t"
    most: float = 999.0
    bend: float = 4.0
    weight: float = 1.0
    schedule: str = "constant"

    def __post_init__(self) -> None:
        check_weight(self.weight, self.schedule, "penalise_paths")
        if not self.most > 0 or not self.bend > 0:
            raise ParseError(f"most and bend lie above 0, got {self.most} and {self.bend}", where="penalise_paths")

    def run(self, program: Program, ctx: Context) -> Program:
        found = mixtures(program, ctx)
        regions = {one.region.path: one.region for one in found}
        for path, region in regions.items():
            times = [node for node in region.graph.nodes if node.op == "placeholder" and node.name == self.given]
            if not times or len(times[0].meta["val"].shape) != 1:
                ctx.miss(f"no input {self.given} of [texts]", path)
                continue
            for one in (one for one in found if one.region is region):
                if one.scores is None:
                    ctx.miss("the scores of its router are not known", one.site.path)
                elif not same_size(one.scores.meta["val"].shape[0], times[0].meta["val"].shape[0]):
                    ctx.miss(f"its router has no row or rows for each of the texts of {self.given}: another size comes first", one.site.path)
                else:
                    self.mark(one.scores, one.site, ctx)
                    self.mark(one.choice, one.site, ctx)
                    self.mark(times[0], Site("input", TIME, path, {}), ctx)
        return program

    def part(self, marked: Sequence[Marked]) -> Part:
        return Penalty(self.weight, self.schedule, partial(_terms, self, tuple(marked)))


def _terms(of: PenalisePaths, marked: Sequence[Marked]) -> Iterator[Tensor]:
    times = next((one.value for one in marked if one.path == TIME), None)
    if times is None or not times.numel():
        return
    odds, taken, places = [], [], 0
    for path in dict.fromkeys(one.path for one in marked if one.path != TIME):
        values = {one.value.is_floating_point(): one.value for one in marked if one.path == path and one.value is not None}
        if len(values) == 2:
            scores, chosen = values[True].float(), values[False]
            odds.append(scores.softmax(-1).flatten(1, -2).mean(1) if scores.dim() > 2 else scores.softmax(-1))
            taken.append(torch.stack([counts(one, scores.shape[-1]) for one in chosen]).gt(0).float())
            places += chosen.shape[-1]
    if odds:
        every, chosen = torch.cat(odds, 1) / len(odds), torch.cat(taken, 1)
        wanted = windows(times, every.shape[1], places, of.most, of.bend)
        yield divergence(every, matched(wanted, chosen) / wanted.sum(1, keepdim=True))


def windows(times: Tensor, experts: int, size: int, most: float, bend: float) -> Tensor:
    """float32 [B, experts]: 1 for `size` experts in a row, from where the time says; times [B]."""
    first = ((times.detach().double() / most).clamp(0, 1) ** bend * (experts - size)).round().long()[:, None]
    place = torch.arange(experts, device=times.device)
    return ((place >= first) & (place < first + size)).float()


def matched(wanted: Tensor, chosen: Tensor) -> Tensor:
    """The columns of wanted [B, N] in the order in which, one for each, they differ least from those of chosen [B, N]."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(chosen.T, wanted.T, p=1)
    return wanted[:, torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=wanted.device)]


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """float32 []: Jensen-Shannon's, of rows that each sum to 1, on average over them."""
    middle = ((a + b) / 2 + 1e-6).log()
    return (a * ((a + 1e-6).log() - middle) + b * ((b + 1e-6).log() - middle)).sum(1).mean() / 2


class _Timed(nn.Module):
    """Two mixtures, and a time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Routing(), Routing()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x + t[:, None, None] / 1000))
        return found


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two mixtures of four experts, for six texts of three tokens."""
    torch.manual_seed(0)
    return _Timed().eval(), (torch.randn(6, 3, 8), torch.tensor([0, 200, 400, 600, 800, 999]))
