"""Let routers score, in training, by several looks at a row through dropout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import dropout

from sparsify_compiler.errors import ParseError
from sparsify_compiler.passes.moe import _routing
from sparsify_compiler.passes.moe._routing import mixtures
from sparsify_compiler.passes.moe._write import SCORES
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, Site
from sparsify_compiler.training import Marked, Part, TrainingPass, Watch


@dataclass(frozen=True)
class EnsembleRouters(TrainingPass):
    """In training, let the probability of an expert be the mean over several looks of its router at the row, each through a dropout of its own.

    Matches    the scores that experts are chosen by, of experts_ffn and of experts that share an FFN
    Rewrites   nothing: it marks where, in training alone, the logarithm of the mean probability stands for the scores
    Preserves  values
    Paper      MoFME, Zhang et al., arXiv:2312.16610, whose uncertainty-aware router this is; dropout as uncertainty: Gal and Ghahramani,
               arXiv:1506.02142

    samples  how many looks
    rate     of the dropout on what the router reads

    An expert that only some of the looks want counts less than one that all of them want, and the router learns from all of them. After module.eval()
    it looks once, at everything. The paper also whitens the probabilities with the covariance over the looks, which is not done here.
    """

    samples: int = 5
    rate: float = 0.1

    stands: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.samples < 1 or not 0 <= self.rate < 1:
            raise ParseError(f"samples is 1 or more and rate lies in [0, 1), got {self.samples} and {self.rate}", where="ensemble_routers")

    def run(self, program: Program, ctx: Context) -> Program:
        for region, scores in _scores(program, ctx):
            self.mark(scores, Site("router", str(scores.meta.get("path") or region.qualified(scores.name)), region.path, {}), ctx)
        return program

    def tap(self, region: Region, name: str, node: fx.Node) -> Watch:
        made = Mean(self.samples, self.rate)
        region.module.add_module(name, made)
        inside = _router(node)
        for read in {source: None for one in inside for source in one.all_input_nodes if source not in inside and source.op != "get_attr"}:
            with region.graph.inserting_before(inside[0]):
                looks = region.graph.call_module(f"{name}.looks", (read, bool(read.meta.get(SCORES))))
            for one in inside:
                one.replace_input_with(read, looks)
        with region.graph.inserting_after(node):
            mean = region.graph.call_module(name, (node,))
        mean.meta |= {"val": node.meta["val"]}
        node.replace_all_uses_with(mean, delete_user_cb=lambda user: user is not mean)
        return made

    def part(self, marked: Sequence[Marked]) -> Part:
        return Part()


class Looks(Watch):
    """Stands before a router: x [B, ..., K] -> [samples * B, ..., K], each look with a dropout of its own; x itself where nothing is trained."""

    def __init__(self, samples: int, rate: float) -> None:
        super().__init__()
        self._samples, self._rate, self.many = samples, rate, False

    def forward(self, x: Tensor, whole: bool = False) -> Tensor:  # type: ignore[override]
        self.many = type(x) is Tensor and self.acts and torch.is_grad_enabled() and x.dim() > 1
        if not self.many:
            return x
        every = x.repeat(self._samples, *[1] * (x.dim() - 1))
        return every if whole else dropout(every, self._rate)


class Mean(Watch):
    """Stands behind a router: the logarithm of its mean probabilities, of the size that its scores have. Alike looks give what one gives."""

    def __init__(self, samples: int, rate: float) -> None:
        super().__init__()
        self.looks, self._samples = Looks(samples, rate), samples

    def forward(self, scores: Tensor) -> Tensor:  # type: ignore[override]
        if not self.looks.many:
            return scores
        looks = scores.reshape(self._samples, scores.shape[0] // self._samples, *scores.shape[1:])
        size = looks.logsumexp(-1, keepdim=True)
        return (looks - size).logsumexp(0) - math.log(self._samples) + size.mean(0)


def _scores(program: Program, ctx: Context) -> Iterator[tuple[Region, fx.Node]]:
    found = [(region, node) for region, node in program.nodes() if node.meta.get(SCORES)]
    found = found or [(one.region, one.scores) for one in mixtures(program, ctx) if one.scores is not None]
    return iter({node: (region, node) for region, node in found}.values())


def _router(scores: fx.Node) -> list[fx.Node]:
    """The nodes between what a router reads and its scores, in order: those of its module's path."""
    found, waiting = {scores}, [scores]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source.op == "call_function" and source not in found and source.meta.get("path") == scores.meta.get("path"):
                found.add(source)
                waiting.append(source)
    return [node for node in scores.graph.nodes if node in found]


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A router over four experts."""
    return _routing.example()
