"""The experts of a graph that training acts on, and what routes to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.normal_form_edit import aten, is_call, shape, value
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.passes.moe._write import SCORES
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Site


@dataclass(frozen=True)
class Routed:
    """One experts_ffn: its site, the choice, the scores [..., E] that it is made from, and what compares with a stored number, if anything."""

    site: Site
    chosen: fx.Node
    scores: fx.Node | None
    limit: fx.Node | None


def routed(program: Program, ctx: Context) -> list[Routed]:
    """All of them, in the order of execution; a miss where the model has none."""
    found = list(_found(program))
    if not found:
        ctx.miss("the model has no experts")
    return found


def _found(program: Program) -> Iterator[Routed]:
    for region, op in program.nodes():
        if op.target is experts_ffn.op:
            chosen, gate = op.kwargs["chosen"], value(op.kwargs["gate"])
            assert isinstance(chosen, fx.Node)
            assert gate is not None
            path = str(op.meta.get("site") or op.meta.get("path") or region.qualified(op.name))
            yield Routed(Site("moe", path, region.path, {"op": op.name}), chosen, *_behind(chosen, int(gate.shape[0])))


def _behind(chosen: fx.Node, experts: int) -> tuple[fx.Node | None, fx.Node | None]:
    """(scores, what reads a number): from the choice back to the scores, a router's last node or a linear with an output for each expert."""
    scores: fx.Node | None = None
    limit: fx.Node | None = None
    waiting, seen = [chosen], {chosen}
    while waiting:
        node = waiting.pop(0)
        sizes = shape(node)
        if node.meta.get(SCORES) or (is_call(node, aten.linear.default) and sizes is not None and sizes[-1] == experts):
            scores = scores or node
            continue
        if any(source.op == "get_attr" and shape(source) == () for source in node.all_input_nodes):
            limit = node
        waiting += [source for source in node.all_input_nodes if source not in seen]
        seen.update(node.all_input_nodes)
    return scores, limit


class Routing(nn.Module):
    """Four experts, of which a row runs through as many as a number says; for examples of passes."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.gate, self.down = (nn.Parameter(torch.randn(sizes) / 3) for sizes in ((4, 6, 8), (4, 8, 6)))
        self.limit = nn.Buffer(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        order = self.router(x).argsort(-1, descending=True)
        chosen = torch.where(torch.arange(4) < self.limit, order, -1)
        y: Tensor = experts_ffn.op(x, chosen, None, self.gate, None, self.down, activation="relu")
        return y


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Six rows of them."""
    torch.manual_seed(0)
    return Routing().eval(), (torch.randn(6, 8),)
