"""Move the thresholds of FFNs while the model is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.errors import ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.ops import select
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program
from sparsify_compiler.site_ffn import neurons_of
from sparsify_compiler.training import Marked, Part, TrainingPass

KIND = ("ffn",)


@dataclass(frozen=True)
class ScheduleThreshold(TrainingPass):
    """In training, set the threshold below which activations are zero to `to` times what a schedule says.

    Matches    an FFN whose activation is a selection with a stored threshold, as replace_activation(to="fatrelu") makes it
    Rewrites   nothing: it marks the thresholds that hook.step() of sc.attach() moves
    Preserves  values
    Paper      ProSparse, Song et al., arXiv:2402.13516, section 3.2

    to        the threshold where the schedule says 1
    schedule  a file of passes/train/schedules, of the number of steps
    targets   selectors of FFN sites; all by default
    ignore    selectors of FFN sites
    """

    to: float = 0.01
    schedule: str = "after"
    targets: tuple[str, ...] = KIND
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Named.parse("schedule", self.schedule)(0)
        if not 0 <= self.to < float("inf"):
            raise ParseError(f"a threshold is a number of 0 or more, got {self.to}", where="schedule_threshold")
        self.take_selectors("targets", "ignore")

    def run(self, program: Program, ctx: Context) -> Program:
        for site in self.ffns(program, ctx):
            value = neurons_of(program.regions[site.region], site)
            limit = value.kwargs.get("limit") if value.target is select.op else None
            if isinstance(limit, fx.Node) and limit.op == "get_attr":
                self.mark(value, site, ctx)
            else:
                ctx.miss("its activation has no stored threshold", site.path)
        return program

    def part(self, marked: Sequence[Marked]) -> Part:
        return _Threshold(self, marked)


class _Threshold(Part):
    def __init__(self, of: ScheduleThreshold, marked: Sequence[Marked]) -> None:
        self._to, self._schedule = of.to, Named.parse("schedule", of.schedule)
        self._limits = [one.tensors["limit"] for one in marked]

    def move(self, step: int) -> None:
        for limit in self._limits:
            limit.fill_(self._to * self._schedule(step))


class Thresholded(nn.Module):
    """An FFN with FATReLU."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(inputs, hidden), nn.Linear(hidden, inputs)
        self.register_buffer("limit", torch.tensor(0.1, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(select.op(nn.functional.relu(self.up(x)), self.limit))
        return y


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An FFN that has a threshold."""
    torch.manual_seed(0)
    return Thresholded(16, 32).eval(), (torch.randn(6, 16),)
