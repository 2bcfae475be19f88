"""Add a term to the training loss that acts on the routers of experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, fx, nn

from sparsify_compiler.masked import Masked
from sparsify_compiler.named import Named
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.passes.moe import _routing
from sparsify_compiler.passes.moe._routing import found_mixtures, mixtures
from sparsify_compiler.passes.moe.route_tokens import TOKEN_SCORES
from sparsify_compiler.passes.train._experts import WatchedExperts, tap_experts
from sparsify_compiler.passes.train._penalty import Penalty, check_weight
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, Site
from sparsify_compiler.training import Marked, Part, TrainingPass, Watch


@dataclass(frozen=True)
class PenaliseRouting(TrainingPass):
    """In training, add the mean over the routers of a loss of their scores and choices, times a weight that a schedule moves.

    Matches    experts_ffn(x, choice of scores, ...), as split_experts makes it; top_tokens(scores, share), as route_tokens does
    Rewrites   nothing: it marks what hook.loss() of sc.attach() is made of
    Preserves  values
    Paper      none: the frame that Switch Transformer (arXiv:2101.03961) and BlockFFN (arXiv:2507.08771) fill in

    loss      a file of passes/train/router_losses, with options of its own in parentheses; of those that say "depths" also for routed tokens
    weight    what the loss is multiplied with
    schedule  a file of passes/train/schedules, of the number of steps, which multiplies the weight
    """

    loss: str = "load_balance"
    weight: float = 0.01
    schedule: str = "constant"

    def __post_init__(self) -> None:
        self._loss()
        check_weight(self.weight, self.schedule, "penalise_routing")

    def run(self, program: Program, ctx: Context) -> Program:
        depths = self._depths(program, ctx)
        for one in found_mixtures(program) if depths else mixtures(program, ctx):
            if one.scores is None:
                ctx.miss("the scores of its router are not known", one.site.path)
                continue
            self.mark(one.scores, one.site, ctx)
            self.mark(one.choice, one.site, ctx)
            if "experts" in self._loss().statistics:
                self.mark(one.op, one.site, ctx)
        return program

    def _depths(self, program: Program, ctx: Context) -> bool:
        """Mark what chooses tokens for blocks, where the loss knows such choices. Are there any?"""
        found = [(region, node) for region, node in program.nodes() if TOKEN_SCORES in node.meta and "depths" in self._loss().statistics]
        for region, node in found:
            site = Site("block", str(node.meta.get("path") or region.qualified(node.name)), region.path, {})
            self.mark(region.node(node.meta[TOKEN_SCORES]), site, ctx)
            self.mark(node, site, ctx)
        return bool(found)

    def tap(self, region: Region, name: str, node: fx.Node) -> Watch | Masked:
        return tap_experts(region, name, node) if node.target is experts_ffn.op else super().tap(region, name, node)

    def part(self, marked: Sequence[Marked]) -> Part:
        return Penalty(self.weight, self.schedule, partial(_terms, self._loss(), tuple(marked)))

    def _loss(self) -> Named:
        return Named.parse("router loss", self.loss)


def _terms(loss: Named, marked: Sequence[Marked]) -> Iterator[Tensor]:
    """Of each router that gave scores and a choice."""
    seen: dict[str, dict[bool, Tensor]] = {}
    experts = {one.path: one.tap for one in marked if isinstance(one.tap, WatchedExperts)}
    for one in marked:
        if one.value is not None and one.value.numel() and one.tap is not experts.get(one.path):
            seen.setdefault(one.path, {})[one.value.is_floating_point()] = one.value
    for path, values in seen.items():
        if len(values) == 2:
            yield loss(values[True].float(), values[False], *([experts[path]] if path in experts else ()))


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A router over four experts."""
    return _routing.example()
