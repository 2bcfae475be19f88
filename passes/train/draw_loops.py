"""Let the number of loops through an FFN be drawn, and learn, while the model is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import gumbel_softmax

from sparsify_compiler.errors import ParseError
from sparsify_compiler.normal_form_edit import aten, is_call
from sparsify_compiler.passes.moe.reuse_ffns import at_least, one_of
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, Site
from sparsify_compiler.training import Marked, Part, TrainingPass, Watch


@dataclass(frozen=True)
class DrawLoops(TrainingPass):
    """In training, draw the number of loops of each row by its scores, with a gradient straight through, and compute every loop for every row.

    Matches    the choice of loops that reuse_ffns makes
    Rewrites   nothing: it marks where, in training alone, a draw stands for the best score
    Preserves  values
    Paper      VersatileFFN, Nie et al., arXiv:2512.14531; draws as in Gumbel-Softmax, Jang et al., arXiv:1611.01144

    first  temperature of the gradient at the beginning
    last   temperature from `steps` on; it falls by the same factor in each step
    steps  of training

    After module.eval() a row has the number of highest score, and computes no more loops than those.
    """

    first: float = 5.0
    last: float = 0.1
    steps: int = 10000

    stands: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.last <= self.first:
            raise ParseError(f"steps is 1 or more, and 0 < last <= first; got {self.steps}, {self.last} and {self.first}", where="draw_loops")

    def run(self, program: Program, ctx: Context) -> Program:
        found = [(region, node) for region, node in program.nodes() if _scores(node) is not None]
        if not found:
            ctx.miss("no row chooses how often it runs through an FFN: reuse_ffns() lets it")
        for region, node in found:
            self.mark(node, Site("router", str(node.meta.get("path") or region.qualified(node.name)), region.path, {}), ctx)
        return program

    def tap(self, region: Region, name: str, node: fx.Node) -> Watch:
        made = Drawn(self.first)
        drawn = _stand(region, name, node, made, _scores(node))
        runs = dict.fromkeys(user for reader in drawn.users for user in reader.users if is_call(user, aten.amax.default))
        for at, run in enumerate(runs):  # what says which rows run a loop: found behind the choice, which a captured graph has but once
            _stand(region, f"{name}_run_{at}", run, Every())
        return made

    def part(self, marked: Sequence[Marked]) -> Part:
        return _Cooled(self, [one.tap for one in marked if isinstance(one.tap, Drawn)])


class Drawn(Watch):
    """Stands behind a choice [..., n], ones and zeros. In training: a draw by the scores, at a temperature (float32 [])."""

    heat: Tensor

    def __init__(self, heat: float) -> None:
        super().__init__()
        self.register_buffer("heat", torch.tensor(heat, dtype=torch.float32), persistent=False)  # a number would be a new graph for torch.compile

    def forward(self, share: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if type(scores) is not Tensor or not self.acts or not torch.is_grad_enabled():
            return share
        return gumbel_softmax(scores, self.heat, hard=True).to(share.dtype)  # type: ignore[arg-type]  # a tensor divides as a number does


class Every(Watch):
    """Stands behind which rows run a loop, numbers above 0. In training: all of them."""

    def forward(self, runs: Tensor) -> Tensor:  # type: ignore[override]
        return torch.ones_like(runs) if type(runs) is Tensor and self.acts and torch.is_grad_enabled() else runs


class _Cooled(Part):
    def __init__(self, of: DrawLoops, taps: Sequence[Drawn]) -> None:
        self._of, self._taps, self.ends = of, taps, of.steps

    def move(self, step: int) -> None:
        for one in self._taps:
            one.heat.fill_(self._of.first * (self._of.last / self._of.first) ** min(step / self._of.steps, 1.0))


def _stand(region: Region, name: str, node: fx.Node, made: Watch, *others: fx.Node | None) -> fx.Node:
    """Let a watch of a node, and of others, stand for it wherever it is read."""
    region.module.add_module(name, made)
    with region.graph.inserting_after(node):
        new = region.graph.call_module(name, (node, *others))
    new.meta |= {"val": node.meta["val"]}
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def _scores(node: fx.Node) -> fx.Node | None:
    """The scores that a choice of one of several was made from; None of other nodes."""
    index = node.kwargs.get("index") if is_call(node, aten.scatter.value) and node.kwargs["value"] == 1 else None
    best = isinstance(index, fx.Node) and is_call(index, aten.argmax.default) and index.kwargs.get("keepdim")
    return index.kwargs["self"] if best else None  # type: ignore[union-attr]


class _Looped(nn.Module):
    """A row is taken once to three times."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        share, run = one_of(scores), one_of(scores)
        found = x
        for loop in (2, 3):
            found = found + share[..., loop - 1 :].sum(-1, keepdim=True) * (at_least(run, loop) + 1) * x
        return found


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Six rows that choose how often they are taken."""
    torch.manual_seed(0)
    return _Looped().eval(), (torch.randn(6, 8),)
