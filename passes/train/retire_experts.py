"""Take experts out of mixtures while the model is trained, those that the router needs least first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparsify_compiler.anew import Anew
from sparsify_compiler.errors import ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.passes.moe._refused import added
from sparsify_compiler.passes.moe._routing import Mixture, Routing, mixtures
from sparsify_compiler.passes_api import Context
from sparsify_compiler.processes import mean_over_processes
from sparsify_compiler.program import Program
from sparsify_compiler.training import LOWEST, META, Marked, Part, TrainingPass

MEASURES = ("probability", "hits")


@dataclass(frozen=True)
class RetireExperts(TrainingPass):
    """In training, let the experts of each mixture that its router needs least retire, a few at a time, until so many are left.

    Matches    experts_ffn(x, choice of scores, ...), of the model itself or as split_experts makes it
    Rewrites   the scores to scores + ledger[0], which begins as zeros and becomes very low where an expert has retired; ledger[1] sums up how much
               each of them was needed
    Preserves  values
    Paper      Task-Specific Expert Pruning, Chen et al., arXiv:2206.00277

    last      how many are left at the end; never fewer than a row takes
    schedule  a file of passes/train/schedules, of the number of steps: all are there where it says 0, `last` where it says 1
    window    experts retire at the end of so many steps
    measure   "probability": the sum over the rows of an expert's probability where it was chosen; "hits": the number of those rows
    early     whatever the schedule says, experts retire that were needed less than so many times the mean of those that are left

    Needs are summed up from the first step on, over the last forward pass before each step; where several processes train together they are averaged
    over them, so that all retire alike. The ledger is a buffer of the module, so a saved state
    goes on where it was. Retired experts are still stored: drop_experts(density=...) on texts of the task removes them, who are chosen by no row.
    """

    last: int = 1
    schedule: str = "ramp"
    window: int = 100
    measure: Literal["probability", "hits"] = "probability"
    early: float = 0.0

    def __post_init__(self) -> None:
        Named.parse("schedule", self.schedule)(0)
        if self.last < 1 or self.window < 1 or not 0 <= self.early < 1:
            raise ParseError(f"last and window are 1 or more, early lies in [0, 1); got {self.last}, {self.window} and {self.early}",
                             where="retire_experts")
        if self.measure not in MEASURES:
            raise ParseError(f"measure is one of {', '.join(MEASURES)}, not {self.measure!r}", where="retire_experts")

    def run(self, program: Program, ctx: Context) -> Program:
        for one in mixtures(program, ctx):
            why = _unfit(one)
            if why is not None:
                ctx.miss(why, one.site.path)
            elif ctx.spend():
                self._watch(one, ctx)
        return program

    def _watch(self, one: Mixture, ctx: Context) -> None:
        assert one.scores is not None
        ledger = torch.zeros(2, one.experts, dtype=torch.float32)
        new = added(one.region, one.scores, ledger, "ledger", self.name())
        reads = next(node for node in new.all_input_nodes if node is not one.scores)
        for node in (reads, new, one.chosen):
            self.mark(node, one.site, ctx)

    def part(self, marked: Sequence[Marked]) -> Part:
        return _Ledgers(self, marked)


def _unfit(one: Mixture) -> str | None:
    if one.scores is None or one.scores.meta["val"].shape[-1] != one.experts:
        return "the scores of its router are not known"
    if any(isinstance(by, RetireExperts) for by, _ in one.scores.meta.get(META, ())):
        return "its experts retire already"
    if int(one.chosen.meta["val"].shape[-1]) >= one.experts:
        return "a row may take all of its experts, so that none can retire: top_k has fewer places"
    return None


class _Ledgers(Part):
    def __init__(self, of: RetireExperts, marked: Sequence[Marked]) -> None:
        self._of, self._schedule = of, Named.parse("schedule", of.schedule)
        self._ledgers = {one.path: ledger for one in marked for ledger in one.tensors.values() if ledger.dim() == 2 and len(ledger) == 2}
        self._seen = [one for one in marked if not one.tensors]

    def update(self, step: int) -> Iterable[Anew]:
        for path, ledger in self._ledgers.items():
            values = {one.value.is_floating_point(): one.value for one in self._seen if one.path == path and one.value is not None}
            if len(values) == 2:
                rows = needed(values[True], values[False], self._of.measure) if values[False].numel() else torch.zeros_like(ledger[1])
                ledger[1] += mean_over_processes(rows)
                if step % self._of.window == 0:
                    self._retire(ledger, values[False].shape[-1], self._schedule(step))
        return ()

    def _retire(self, ledger: Tensor, taken: int, share: float) -> None:
        """Of the experts that are left, all but the most needed ones; as many stay as a row takes."""
        experts = ledger.shape[1]
        least = max(min(self._of.last, experts), taken)
        left = (ledger[0] == 0).nonzero()[:, 0]
        order = left[ledger[1, left].argsort(descending=True, stable=True)]
        enough = int((ledger[1, left] >= self._of.early * ledger[1, left].mean()).sum())
        ledger[0, order[max(min(round(experts + (least - experts) * share), enough), least):]] = LOWEST


def needed(scores: Tensor, chosen: Tensor, measure: str) -> Tensor:
    """float32 [E]: scores [..., E], chosen int64 [..., k], -1 for none; of each expert the share of the rows, or of their probability."""
    flat, places = scores.detach().float().flatten(0, -2).softmax(-1), chosen.flatten(0, -2)
    hits = torch.zeros(flat.shape[0], flat.shape[1] + 1, dtype=torch.float32, device=flat.device).scatter_(1, places.long() + 1, 1.0)[:, 1:]
    return (hits if measure == "hits" else hits * flat).mean(0)


class _Two(Routing):
    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).topk(2, -1).indices
        y: Tensor = experts_ffn.op(x, chosen, None, self.gate, None, self.down, activation="relu")
        return y


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A router over four experts, of which a row takes two."""
    torch.manual_seed(0)
    return _Two().eval(), (torch.randn(6, 8),)
