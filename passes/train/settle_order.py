"""Let the order of a tree's leaves settle while the model is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.anew import Anew
from sparsify_compiler.errors import ParseError
from sparsify_compiler.normal_form_edit import aten, is_call, shape
from sparsify_compiler.passes.moe.routers.tree import shares
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, Site
from sparsify_compiler.training import Marked, Part, TrainingPass

SURE = 1000.0  # the logarithm by which what is settled stands above the rest


@dataclass(frozen=True)
class SettleOrder(TrainingPass):
    """In training, cool the learnt order of a tree's leaves until each expert stands at one of them, and keep it from then on.

    Matches    order / heat, both stored, as the router tree(order=True) reads them
    Rewrites   nothing: it marks what hook.step() of sc.attach() moves
    Preserves  values
    Paper      COMET, Ibrahim et al., arXiv:2306.02824; shares by Sinkhorn as in Mena et al., arXiv:1802.08665

    steps  of training, at whose end the order is the permutation that the shares are nearest to
    first  heat at the beginning: the order's logits are divided by it
    last   heat at the end; it falls by the same factor in each step

    Before, every expert has a share of every leaf. The search is by gradients and heat alone: the paper's program also adds noise to the logits.
    """

    steps: int = 1000
    first: float = 0.1
    last: float = 0.001

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.last <= self.first:
            raise ParseError(f"steps is 1 or more, and 0 < last <= first; got {self.steps}, {self.first} and {self.last}", where="settle_order")

    def run(self, program: Program, ctx: Context) -> Program:
        found = list(_orders(program))
        if not found:
            ctx.miss("no router learns an order: router='tree(order=True)' does")
        for region, node in found:
            self.mark(node, Site("router", str(node.meta.get("path") or region.qualified(node.name)), region.path, {}), ctx)
        return program

    def part(self, marked: Sequence[Marked]) -> Part:
        return _Orders(self, marked)


def _orders(program: Program) -> Iterator[tuple[Region, fx.Node]]:
    for region, node in program.nodes():
        if is_call(node, aten.div.Tensor) and all(getattr(node.kwargs[name], "op", "") == "get_attr" for name in ("self", "other")):
            order, heat = (shape(node.kwargs[name]) for name in ("self", "other"))
            if order is not None and len(order) == 3 and order[1] == order[2] and heat == ():
                yield region, node


class _Orders(Part):
    def __init__(self, of: SettleOrder, marked: Sequence[Marked]) -> None:
        self._of, self.ends = of, of.steps
        self._tensors = [(one.tensors["self"], one.tensors["other"]) for one in marked]

    def move(self, step: int) -> None:
        done = min(step / self._of.steps, 1.0)
        for _, heat in self._tensors:
            heat.fill_(self._of.first * (self._of.last / self._of.first) ** done)

    def update(self, step: int) -> Iterable[Anew]:
        for order, heat in self._tensors if step == self._of.steps else ():
            order.copy_(settled(shares(order / heat)) * SURE * self._of.last)
            if order.requires_grad:
                yield Anew.at(order, torch.ones_like(order, dtype=torch.bool))


def settled(logs: Tensor) -> Tensor:
    """Of each of [trees, n, n] the permutation, ones and zeros, over whose ones the shares sum to most."""
    from scipy.optimize import linear_sum_assignment

    made = torch.zeros_like(logs)
    for one, own in zip(made, logs, strict=True):
        rows, columns = linear_sum_assignment(own.detach().float().exp().cpu().numpy(), maximize=True)
        one[torch.as_tensor(rows), torch.as_tensor(columns)] = 1
    return made


class _Ordered(nn.Module):
    """Two leaves' shares of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.order, self.heat = nn.Parameter(torch.rand(1, 4, 4)), nn.Buffer(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x @ shares(self.order / self.heat)[0].exp()
        return found


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Four experts' shares of four leaves."""
    torch.manual_seed(0)
    return _Ordered().eval(), (torch.randn(6, 4),)
