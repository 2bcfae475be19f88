"""Add a term to the training loss that makes activations sparse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.errors import ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.passes.prune._layers import chosen_linears
from sparsify_compiler.passes.train._penalty import Penalty, check_weight
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program
from sparsify_compiler.site_ffn import neurons_of
from sparsify_compiler.training import Marked, Part, TrainingPass

KIND = ("ffn",)


@dataclass(frozen=True)
class PenaliseActivations(TrainingPass):
    """In training, add the mean over the sites of a loss of their activations, times a weight that a schedule moves.

    Matches    linear(act(linear(x, up)), down) and linear(act(linear(x, gate)) * linear(x, up), down); or linear(x, weight)
    Rewrites   nothing: it marks what hook.loss() of sc.attach() is made of
    Preserves  values
    Paper      none: the frame that ProSparse (arXiv:2402.13516) and DEFT (arXiv:2402.01911) fill in

    loss      a file of passes/train/losses, with options of its own in parentheses
    weight    what the loss is multiplied with
    schedule  a file of passes/train/schedules, of the number of steps, which multiplies the weight
    of        "neurons", what the activation of an FFN gives (of the gate, where there is one), "hidden", what its down projection reads, or "inputs",
              what a linear layer reads
    targets   selectors of FFN sites; all by default. Of "inputs", of linear layers, as in mask_weights: those in FFNs by default
    ignore    selectors of such sites
    """

    loss: str = "l1"
    weight: float = 1.0
    schedule: str = "constant"
    of: Literal["neurons", "hidden", "inputs"] = "neurons"
    targets: tuple[str, ...] = KIND
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Named.parse("activation loss", self.loss)
        check_weight(self.weight, self.schedule, "penalise_activations")
        if self.of not in ("neurons", "hidden", "inputs"):
            raise ParseError(f"of is 'neurons', 'hidden' or 'inputs', not {self.of!r}", where="penalise_activations")
        self.take_selectors("targets", "ignore")

    def run(self, program: Program, ctx: Context) -> Program:
        for site in chosen_linears(program, self.targets, self.ignore) if self.of == "inputs" else self.ffns(program, ctx):
            region = program.regions[site.region]
            reader = region.node(site.roles["op" if self.of == "inputs" else "down"])
            value = neurons_of(region, site) if self.of == "neurons" else reader.kwargs["input"]
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
