"""The mixtures of experts of a graph: what routes to them, and their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.fold import evaluate, is_constant, masks
from sparsify_compiler.normal_form_edit import aten, is_call, shape, value
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.passes.moe._write import CHOICE, LOOPS, SCORES
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, Site

STACKED = ("gate", "up", "down", "gate_bias", "up_bias", "bias")  # arguments of the op with one entry for each expert


@dataclass(frozen=True)
class Mixture:
    """One experts_ffn: its node, the scores [..., E] that its choice is made from, and what compares with a stored number, if anything."""

    region: Region
    site: Site
    op: Any
    scores: fx.Node | None
    limit: fx.Node | None

    @property
    def chosen(self) -> fx.Node:
        """The choice."""
        found: fx.Node = self.op.kwargs["chosen"]
        return found

    @property
    def choice(self) -> fx.Node:
        """The choice with experts that no kernel sees, where the mixture has some."""
        name = self.chosen.meta.get(CHOICE)
        return self.chosen if name is None else self.region.node(name)

    @property
    def experts(self) -> int:
        """E."""
        return _experts_of(self.op)

    @property
    def stacked(self) -> dict[str, fx.Node]:
        """The nodes of its weights, by the op's arguments."""
        return {name: node for name in STACKED if isinstance(node := self.op.kwargs.get(name), fx.Node)}

    @property
    def places(self) -> list[fx.Node]:
        """What calibration looks at: what the mixture reads, the choice, and its weights where there are some."""
        return [node for name in ("x", "chosen", "weights") if isinstance(node := self.op.kwargs.get(name), fx.Node)]

    @property
    def bytes_a_row(self) -> int:
        """Of what calibration keeps."""
        return sum(4 * int(node.meta["val"].shape[-1]) for node in self.places)

    def tensors(self) -> dict[str, Tensor]:
        """Its weights, in their own dtype."""
        return {name: evaluate(self.region, node) for name, node in self.stacked.items()}

    def unfit(self) -> str | None:
        """Why its experts cannot be changed; None where they can."""
        if not all(is_constant(node) for node in self.stacked.values()):
            return "its weights are not stored"
        if CHOICE in self.chosen.meta:
            return "its router knows experts that no kernel sees"
        if any(masks(self.region, node) for node in self.stacked.values()):
            return "its weights are masked: drop experts first, and prune those that stay"
        return None


def mixtures(program: Program, ctx: Context) -> list[Mixture]:
    """All of them, in the order of execution; a miss where the model has none."""
    found = list(found_mixtures(program))
    if not found:
        ctx.miss("the model has no experts")
    return found


def found_mixtures(program: Program) -> Iterator[Mixture]:
    """All of them, or none."""
    for region, op in program.nodes():
        if op.target is experts_ffn.op and not op.meta.get(LOOPS):
            path = str(op.meta.get("site") or op.meta.get("path") or region.qualified(op.name))
            yield Mixture(region, Site("moe", path, region.path, {"op": op.name}), op, *_behind(op.kwargs["chosen"], _experts_of(op)))


def scores_of(op: fx.Node) -> fx.Node | None:
    """The scores that the choice of an experts_ffn is made from."""
    return _behind(op.kwargs["chosen"], _experts_of(op))[0]


def _experts_of(op: fx.Node) -> int:
    gate = value(op.kwargs["gate"])
    assert gate is not None
    return int(gate.shape[0])


def _behind(chosen: Any, experts: int) -> tuple[fx.Node | None, fx.Node | None]:
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
