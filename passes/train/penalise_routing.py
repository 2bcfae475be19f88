"""Add a term to the training loss that acts on the routers of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsify_compiler.errors import ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.passes.train import _routing
from sparsify_compiler.passes.train._routing import routed
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program
from sparsify_compiler.training import Marked, Part, TrainingPass


@dataclass(frozen=True)
class PenaliseRouting(TrainingPass):
    """In training, add the mean over the routers of a loss of their scores and choices, times a weight that a schedule moves.

    Matches    experts_ffn(x, choice of scores, ...), as split_experts makes it
    Rewrites   nothing: it marks what hook.loss() of sc.attach() is made of
    Preserves  values
    Paper      none: the frame that Switch Transformer (arXiv:2101.03961) and BlockFFN (arXiv:2507.08771) fill in

    loss      a file of passes/train/router_losses, with options of its own in parentheses
    weight    what the loss is multiplied with
    schedule  a file of passes/train/schedules, of the number of steps, which multiplies the weight
    """

    loss: str = "load_balance"
    weight: float = 0.01
    schedule: str = "constant"

    def __post_init__(self) -> None:
        Named.parse("router loss", self.loss)
        Named.parse("schedule", self.schedule)(0)
        if not 0 <= self.weight < float("inf"):
            raise ParseError(f"a weight is a number of 0 or more, got {self.weight}", where="penalise_routing")

    def run(self, program: Program, ctx: Context) -> Program:
        found = list(routed(program))
        if not found:
            ctx.miss("the model has no experts")
        for one in found:
            if one.scores is None:
                ctx.miss("the scores of its router are not known", one.site.path)
                continue
            self.mark(one.scores, one.site, ctx)
            self.mark(one.chosen, one.site, ctx)
        return program

    def part(self, marked: Sequence[Marked]) -> Part:
        return _Penalty(self, marked)


class _Penalty(Part):
    def __init__(self, of: PenaliseRouting, marked: Sequence[Marked]) -> None:
        self._of, self._marked = of, tuple(marked)
        self._loss, self._schedule = Named.parse("router loss", of.loss), Named.parse("schedule", of.schedule)

    def loss(self, step: int) -> Tensor | None:
        weight = self._of.weight * self._schedule(step)
        seen: dict[str, dict[bool, Tensor]] = {}
        for one in self._marked:
            if one.value is not None and one.value.numel():
                seen.setdefault(one.path, {})[one.value.is_floating_point()] = one.value
        terms = [self._loss(values[True].float(), values[False]) for values in seen.values() if len(values) == 2]
        return weight * torch.stack(terms).mean() if terms and weight else None


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A router over four experts."""
    return _routing.example()
