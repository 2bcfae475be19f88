"""Add to the training loss how much two passes over one batch disagree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.errors import ParseError
from sparsify_compiler.passes.moe import _routing
from sparsify_compiler.passes.train._penalty import Penalty, check_weight
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, Site
from sparsify_compiler.training import Marked, Part, TrainingPass, Watch

OF = ("probabilities", "values")


@dataclass(frozen=True)
class PenaliseDisagreement(TrainingPass):
    """In training, add how far what the model gave in two forward passes since the last backward() is from each other, times a weight.

    Matches    the model's first output of floating point, where the whole model is one graph
    Rewrites   nothing: it marks what hook.loss() of sc.attach() is made of
    Preserves  values
    Paper      THOR, Zuo et al., arXiv:2110.04260, whose passes draw different experts: route_gradients(estimator="dice") does

    of        "probabilities": half the sum of both divergences (Kullback-Leibler) between the softmax of the two, over the last dimension;
              "values": the mean square of the difference
    weight    what the loss is multiplied with
    schedule  a file of passes/train/schedules, of the number of steps, which multiplies the weight

    Run the model twice on a batch, and call backward() once, on both losses and hook.loss(); sc.recover() does. A pass is forgotten when its
    gradient is taken, so of batches that gather one step's gradient each is compared with itself. After one pass alone, and after passes of
    different shapes, it adds nothing.
    """

    of: str = "probabilities"
    weight: float = 1.0
    schedule: str = "constant"

    def __post_init__(self) -> None:
        if self.of not in OF:
            raise ParseError(f"of is one of {OF}, not {self.of!r}", where="penalise_disagreement")
        check_weight(self.weight, self.schedule, "penalise_disagreement")

    def run(self, program: Program, ctx: Context) -> Program:
        region = program.regions.get("")
        output: Any = None if region is None else _output(region)
        if output is None:
            ctx.miss("the model is no single graph with an output of floating point")
        else:
            self.mark(output, Site("output", "output", "", {}), ctx)
        return program

    def tap(self, region: Region, name: str, node: fx.Node) -> Watch:
        made = WatchedTwice()
        region.module.add_module(name, made)
        with region.graph.inserting_after(node):
            region.graph.call_module(name, (node,))
        return made

    def part(self, marked: Sequence[Marked]) -> Part:
        return _Twice(self, marked)


class WatchedTwice(Watch):
    """Keeps what went by in the last two forward passes whose gradients were not taken: afterwards their graphs are gone."""

    def forward(self, x: Tensor) -> None:
        if type(x) is Tensor and torch.is_grad_enabled() and self.acts:
            self.seen = [*self.seen[-1:], x]
            if x.requires_grad:
                x.register_hook(lambda gradient: self.seen.clear())  # type: ignore[no-untyped-call]


class _Twice(Penalty):
    passes = 2

    def __init__(self, of: PenaliseDisagreement, marked: Sequence[Marked]) -> None:
        super().__init__(of.weight, of.schedule, partial(_terms, of.of, marked))
        self._marked = marked

    def move(self, step: int) -> None:
        """The passes of the next step are other ones."""
        for one in self._marked:
            if isinstance(one.tap, WatchedTwice):
                one.tap.seen = []


def _terms(of: str, marked: Sequence[Marked]) -> Iterator[Tensor]:
    for one in marked:
        seen = one.tap.seen if isinstance(one.tap, WatchedTwice) else []
        if len(seen) == 2 and seen[0].shape == seen[1].shape and seen[0].numel():
            yield disagreement(seen[0].float(), seen[1].float(), of)


def disagreement(a: Tensor, b: Tensor, of: str) -> Tensor:
    """[], of two values [..., N]: 0 where they are alike, and symmetric."""
    if of == "values":
        return (a - b).square().mean()
    a, b = a.log_softmax(-1), b.log_softmax(-1)
    return ((a.exp() - b.exp()) * (a - b)).sum(-1).mean() / 2


def _output(region: Region) -> fx.Node | None:
    last: fx.Node = next(node for node in region.graph.nodes if node.op == "output")
    for node in last.all_input_nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            return node
    return None


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A router over four experts."""
    return _routing.example()
