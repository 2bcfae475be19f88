"""Let routers learn from what their choices do while the model is trained."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.named import Named
from sparsify_compiler.passes.moe import _routing
from sparsify_compiler.passes.moe._routing import mixtures, scores_of
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region
from sparsify_compiler.training import META, Marked, Part, TrainingPass, Watch


@dataclass(frozen=True)
class RouteGradients(TrainingPass):
    """In training, give the scores of routers a gradient: weights of 1 and choices have none.

    Matches    experts_ffn(x, choice of scores, weights, ...), as split_experts makes it
    Rewrites   nothing: it marks where, in training alone, an estimator stands for choice and weights
    Preserves  values
    Paper      none: the frame that straight-through gradients (arXiv:1308.3432) and SparseMixer (arXiv:2310.00811) fill in

    estimator  a file of passes/train/router_gradients, with options of its own in parentheses
    """

    estimator: str = "straight_through"

    def __post_init__(self) -> None:
        Named.parse("router gradient", self.estimator)

    def run(self, program: Program, ctx: Context) -> Program:
        for one in mixtures(program, ctx):
            if one.scores is None:
                ctx.miss("the scores of its router are not known", one.site.path)
            elif any(isinstance(other, RouteGradients) and other != self for other, _ in one.op.meta.get(META, ())):
                ctx.miss("its router has an estimator already", one.site.path)
            elif one.choice is not one.chosen:
                ctx.miss("its router knows experts that no kernel sees", one.site.path)
            else:
                self.mark(one.op, one.site, ctx)
        return program

    def tap(self, region: Region, name: str, node: fx.Node) -> Watch:
        made = Estimated(Named.parse("router gradient", self.estimator))
        region.module.add_module(name, made)
        given: tuple[Any, ...] = scores_of(node), node.kwargs["chosen"], node.kwargs.get("weights")
        with region.graph.inserting_before(node):
            both = region.graph.call_module(name, given)
            chosen, weights = (region.graph.call_function(operator.getitem, (both, place)) for place in (0, 1))
        for new, like in ((chosen, given[1]), (weights, given[0])):
            new.meta |= {"val": like.meta["val"]}
        node.kwargs = {**node.kwargs, "chosen": chosen, "weights": weights}
        for other in [user for user in given[1].users if user.op == "call_module" and user is not both]:  # a loss looks at what is run
            other.replace_input_with(given[1], chosen)
            weights.append(other)
        return made

    def part(self, marked: Sequence[Marked]) -> Part:
        return Part()


class Estimated(Watch):
    """Stands in a graph before a mixture. After module.eval(), under no_grad, and in an export, it hands on the choice and its weights.

    A router that is frozen, before which nothing is trained, still has its experts drawn.
    """

    def __init__(self, estimator: Named) -> None:
        super().__init__()
        self._estimator = estimator

    def forward(self, scores: Tensor, chosen: Tensor, weights: Tensor | None) -> Any:  # type: ignore[override]
        if type(scores) is not Tensor or not self.acts or not torch.is_grad_enabled():
            return chosen, weights
        return self._estimator(scores, chosen, weights)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A router over four experts."""
    return _routing.example()
