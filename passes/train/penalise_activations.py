"""Add a term to the training loss that makes the activations of FFNs sparse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.errors import ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.passes.train._penalty import Penalty, check_weight
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program
from sparsify_compiler.site_ffn import neurons_of
from sparsify_compiler.training import Marked, Part, TrainingPass

KIND = ("ffn",)


@dataclass(frozen=True)
class PenaliseActivations(TrainingPass):
    """In training, add the mean over the FFNs of a loss of their activations, times a weight that a schedule moves.

    Matches    linear(act(linear(x, up)), down) and linear(act(linear(x, gate)) * linear(x, up), down)
    Rewrites   nothing: it marks what hook.loss() of sc.attach() is made of
    Preserves  values
    Paper      none: the frame that ProSparse (arXiv:2402.13516) and DEFT (arXiv:2402.01911) fill in

    loss      a file of passes/train/losses, with options of its own in parentheses
    weight    what the loss is multiplied with
    schedule  a file of passes/train/schedules, of the number of steps, which multiplies the weight
    of        "neurons", what the activation gives (of the gate, where there is one), or "hidden", what the down projection reads
    targets   selectors of FFN sites; all by default
    ignore    selectors of FFN sites
    """

    loss: str = "l1"
    weight: float = 1.0
    schedule: str = "constant"
    of: Literal["neurons", "hidden"] = "neurons"
    targets: tuple[str, ...] = KIND
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Named.parse("activation loss", self.loss)
        check_weight(self.weight, self.schedule, "penalise_activations")
        if self.of not in ("neurons", "hidden"):
            raise ParseError(f"of is 'neurons' or 'hidden', not {self.of!r}", where="penalise_activations")
        self.take_selectors("targets", "ignore")

    def run(self, program: Program, ctx: Context) -> Program:
        for site in self.ffns(program, ctx):
            region = program.regions[site.region]
            value = neurons_of(region, site) if self.of == "neurons" else region.node(site.roles["down"]).kwargs["input"]
            assert isinstance(value, fx.Node)
            self.mark(value, site, ctx)
        return program

    def part(self, marked: Sequence[Marked]) -> Part:
        return Penalty(self.weight, self.schedule, partial(_terms, Named.parse("activation loss", self.loss), tuple(marked)))


def _terms(loss: Named, marked: Sequence[Marked]) -> Iterator[Tensor]:
    for one in marked:
        if one.value is not None and one.value.numel():
            yield loss(one.value.float())


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An FFN."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval(), (torch.randn(6, 16),)
