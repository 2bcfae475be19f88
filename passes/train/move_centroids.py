"""Move the centroids of attention by clusters while the model is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.anew import Anew
from sparsify_compiler.branches import parse
from sparsify_compiler.errors import ParseError
from sparsify_compiler.ops import attend
from sparsify_compiler.passes.attention._clusters import LEARNED, directions, moved
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, Site
from sparsify_compiler.selectors import select
from sparsify_compiler.training import Marked, Part, TrainingPass, Watch

KIND = ("attention",)


@dataclass(frozen=True)
class MoveCentroids(TrainingPass):
    """In training, let the centroids of attention follow the queries and keys that are nearest to them.

    Matches    attend(query, key, value, learned=[..., centroids, ...], indexer=...) in a captured graph
    Rewrites   nothing: it marks the queries, keys and centroids that hook.step() of sc.attach() moves
    Preserves  values
    Paper      Routing Transformer, Roy et al., arXiv:2003.05997, section 4.1

    decay    how much of a centroid stays in a step; the rest is the mean direction of what was nearest to it in the last forward pass
    targets  selectors of attention sites; all by default
    ignore   selectors of attention sites
    """

    decay: float = 0.999
    targets: tuple[str, ...] = KIND
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ParseError(f"a share of a centroid that stays is between 0 and 1, got {self.decay}", where="move_centroids")
        self.take_selectors("targets", "ignore")

    def run(self, program: Program, ctx: Context) -> Program:
        found = {str(node.meta.get("site", node.name)): (region.path, node) for region, node in program.nodes() if _centroids(node)}
        sites = [Site("attention", path, region, {"op": node.name}) for path, (region, node) in found.items()]
        if not sites:
            ctx.miss("the model has no attention by clusters in a graph")
            return program
        for site in select(sites, self.targets, self.ignore, program):
            self.mark(found[site.path][1], site, ctx)
        return program

    def tap(self, region: Region, name: str, node: fx.Node) -> Watch:
        made = _Both(_centroids(node))
        region.module.add_module(name, made)
        with region.graph.inserting_after(node):
            region.graph.call_module(name, (node.kwargs["query"], node.kwargs["key"]))
        return made

    def part(self, marked: Sequence[Marked]) -> Part:
        return _Following(self.decay, marked)


def _centroids(node: fx.Node) -> str:
    """The argument of an attention that is its centroids; "" where it has none."""
    names = parse(str(node.kwargs["indexer"])).learned if node.target is attend.op else ()
    return f"learned[{names.index(LEARNED[0])}]" if LEARNED[0] in names else ""


class _Both(Watch):
    """Keeps the queries and keys that went by last."""

    def __init__(self, centroids: str) -> None:
        super().__init__()
        self.centroids = centroids

    def forward(self, query: Tensor, key: Tensor) -> None:  # type: ignore[override]
        if type(query) is Tensor:
            self.seen = [query.detach(), key.detach()]


class _Following(Part):
    def __init__(self, decay: float, marked: Sequence[Marked]) -> None:
        self._decay = decay
        self._places = [(one.tap, one.tensors[one.tap.centroids]) for one in marked if isinstance(one.tap, _Both)]

    def update(self, step: int) -> Iterable[Anew]:
        for tap, centroids in self._places:
            if tap.seen:
                rows = torch.cat([directions(rows, len(centroids)) for rows in tap.seen], 1)
                centroids.copy_(moved(rows, centroids, self._decay))
        return ()


class Routed(nn.Module):
    """Attention of two heads by three clusters."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.register_buffer("centroids", nn.functional.normalize(torch.randn(2, 3, 8), dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:-1], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        indexer = "Indexer(scorer='shared_clusters(number=3)', selector='top_k(share=0.5)', block_q=4, block_k=4, order='by_cluster(number=3)')"
        y: Tensor = attend.op(q, k, v, None, [self.centroids], indexer=indexer).transpose(1, 2).flatten(2)
        return y


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Attention by clusters."""
    torch.manual_seed(0)
    return Routed().eval(), (torch.randn(1, 24, 16),)
