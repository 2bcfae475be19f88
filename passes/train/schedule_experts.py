"""Move the number that decides how many experts a row runs through while the model is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sparsify_compiler.errors import ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.passes.moe import _routing
from sparsify_compiler.passes.moe._routing import mixtures
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program
from sparsify_compiler.training import Marked, Part, TrainingPass


@dataclass(frozen=True)
class ScheduleExperts(TrainingPass):
    """In training, set the number of experts, or the threshold of their scores, to what lies between `first` and `last` by a schedule.

    Matches    experts_ffn(x, choice of scores and a stored number, ...), as split_experts makes it with growing_k, top_p or threshold
    Rewrites   nothing: it marks the numbers that hook.step() of sc.attach() moves
    Preserves  values
    Paper      SMoE-Dropout, Chen et al., arXiv:2303.01610, section 3.2

    first     the number where the schedule says 0
    last      the number where it says 1
    schedule  a file of passes/train/schedules, of the number of steps
    """

    first: float = 1.0
    last: float = 16.0
    schedule: str = "ramp"

    def __post_init__(self) -> None:
        Named.parse("schedule", self.schedule)(0)
        if not all(abs(number) < float("inf") for number in (self.first, self.last)):
            raise ParseError(f"first and last are finite numbers, got {self.first} and {self.last}", where="schedule_experts")

    def run(self, program: Program, ctx: Context) -> Program:
        for one in mixtures(program, ctx):
            if one.limit is None:
                ctx.miss("its choice compares with no stored number: selector='growing_k' makes one", one.site.path)
            else:
                self.mark(one.limit, one.site, ctx)
        return program

    def part(self, marked: Sequence[Marked]) -> Part:
        return _Number(self, marked)


class _Number(Part):
    def __init__(self, of: ScheduleExperts, marked: Sequence[Marked]) -> None:
        self._of, self._schedule = of, Named.parse("schedule", of.schedule)
        self._limits = [tensor for one in marked for tensor in one.tensors.values() if tensor.dim() == 0]

    def move(self, step: int) -> None:
        for limit in self._limits:
            limit.fill_(self._of.first + (self._of.last - self._of.first) * self._schedule(step))


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A router over four experts."""
    return _routing.example()
