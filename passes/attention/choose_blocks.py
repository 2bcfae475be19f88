"""Give every head of attention, of several ways to choose its blocks, the one that the calibration batches speak for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsify_compiler.errors import ParseError
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.ops import attend
from sparsify_compiler.passes.attention._calibration import observed
from sparsify_compiler.passes.attention._sites import KIND, attention_sites, give_indexer
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Stage

WINDOW = "Indexer(always=(SlidingWindow(window=512), Sinks(tokens=64)))"
COLUMNS = "Indexer(always=(Windows(size=64), Sinks(tokens=64)), scorer=vertical_slash, selector='top_p(mass=0.9)')"


@dataclass(frozen=True)
class ChooseBlocks(Pass):
    """Give every head the indexer, of several, whose attention is nearest to dense attention on the calibration batches.

    Matches    scaled_dot_product_attention(query, key, value, attn_mask); attentions that ask Hugging Face's registry for their function
    Rewrites   attend(query, key, value, attn_mask, indexer=Indexer(..., choices, heads)), with the choice of each head
    Preserves  signature; quality is measured
    Paper      none: the frame of MInference (arXiv:2407.02490), MoA (arXiv:2406.14909) and LServe (arXiv:2502.14866), which choose by head offline

    choices      indexers of the same blocks
    share        the share of blocks that all heads of the model may read in the mean: the least loss that keeps it, up to one head. None: no limit
    quotas       instead, the share of all heads that each choice gets; they sum to 1
    dense_below  attention over fewer keys than this stays dense; by default lower() measures where that is faster
    targets      selectors of attention sites; all by default
    ignore       selectors of attention sites that stay dense

    The loss of a head is the squared distance of its output to that of dense attention over the square of the latter, summed over the batches.
    """

    choices: tuple[Any, ...] = (Indexer.parse(WINDOW), Indexer.parse(COLUMNS))
    share: float | None = None
    quotas: tuple[float, ...] = ()
    dense_below: int | None = None
    targets: tuple[str, ...] = KIND
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        self.take_selectors("targets", "ignore")
        if not self.choices or not all(isinstance(choice, Indexer) for choice in self.choices):
            raise ParseError(f"choices are indexers, got {self.choices}", where=self.name(), hint=f"for example choices=({WINDOW}, {COLUMNS})")
        learning = next((choice for choice in self.choices if choice.learned), None)
        if learning is not None:
            raise ParseError(f"{learning} learns tensors, and choices are compared before anything is learned", where=self.name(),
                             hint="give all heads that indexer, by select_blocks")
        if self.quotas and (len(self.quotas) != len(self.choices) or abs(sum(self.quotas) - 1) > 1e-6 or min(self.quotas) < 0):
            raise ParseError(f"quotas of {self.quotas} for {len(self.choices)} choices", where=self.name(), hint="one share each, which sum to 1")
        if self.share is not None and (self.quotas or not 0 < self.share <= 1):
            raise ParseError(f"a share of {self.share} of the blocks", where=self.name(), hint="above 0 and at most 1, and not beside quotas")
        self._indexer(list(range(len(self.choices))))

    def _indexer(self, chosen: list[int]) -> Indexer:
        """The indexer of one attention, from the number of each head's choice; the most frequent one is the indexer's own."""
        heads = {i: tuple(head for head, choice in enumerate(chosen) if choice == i) for i in sorted(set(chosen))}
        own = max(heads, key=lambda i: (len(heads[i]), -i))
        others = {i: named for i, named in heads.items() if i != own}
        first: Indexer = self.choices[own]
        return replace(first, choices=tuple(self.choices[i] for i in others), heads=tuple(others.values()), dense_below=self.dense_below,
                       dense_below_decoding=self.dense_below)

    def run(self, program: Program, ctx: Context) -> Program:
        sites = attention_sites(program, ctx, self.targets, self.ignore)
        if not sites:
            return program
        sums = observed(program, sites, ctx, self._observe, self.name())
        every = torch.cat([sums[site.path] for site in sites]).double()  # [heads of all sites, choices, 4]
        loss, density = every[..., 0] / every[..., 1].clamp(min=1e-30), every[..., 2] / every[..., 3].clamp(min=1)
        chosen = by_quota(loss, self.quotas) if self.quotas else within(loss, density, self.share)
        start = 0
        for site in sites:
            stop = start + len(sums[site.path])
            if ctx.spend():
                give_indexer(program, site, self._indexer(chosen[start:stop].tolist()), self.name())
            start = stop
        return program

    def _observe(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, out: Tensor) -> Tensor:
        """[H, choices, 4]: squared distance and square of the dense output, blocks read and blocks that dense attention reads."""
        key_mask, bias, triangle = attend.split_mask(mask, query, key)
        causal = causal or triangle
        dense, found = out.float().nan_to_num(0), []
        for choice in self.choices:
            layout = choice.layout(query, key, causal, scale, key_mask)
            given = layout.attend(query.float(), key.float(), value.float(), key_mask, bias, scale)[0]
            counts = layout.counts.double().expand(len(query), -1, -1)
            read = counts.repeat_interleave(query.shape[1] // counts.shape[1], 1).sum((0, 2))
            whole = len(query) * layout.grid.visible_blocks()
            sums = [(given - dense).square().sum((0, 2, 3)).double(), dense.square().sum((0, 2, 3)).double(), read, torch.full_like(read, whole)]
            found.append(torch.stack(sums, -1))
        return torch.stack(found, 1)


def within(loss: Tensor, density: Tensor, share: float | None) -> Tensor:
    """int [heads]: of the choices [heads, choices] those of least loss whose densities are at most `share` in the mean; the cheapest where none are.

    A price of density is raised until they are (Lagrange), which is the best there is but for the rounding of one head.
    """
    def at(price: float) -> Tensor:
        return (loss + price * density).argmin(1)

    def fits(chosen: Tensor) -> bool:
        return share is None or float(density.gather(1, chosen[:, None]).mean()) <= share

    if fits(at(0)):
        return at(0)
    low, high = -30.0, 30.0  # logarithms
    for _ in range(60):
        price = (low + high) / 2
        low, high = (low, price) if fits(at(math.exp(price))) else (price, high)
    return at(math.exp(high))


def by_quota(loss: Tensor, quotas: tuple[float, ...]) -> Tensor:
    """int [heads]: the choices of least loss [heads, choices] in all, of which each is taken by its share of the heads."""
    from scipy.optimize import linear_sum_assignment

    edges = [round(sum(quotas[:i]) * len(loss)) for i in range(len(quotas) + 1)]
    seats = torch.cat([torch.full((stop - start,), i) for i, (start, stop) in enumerate(pairwise(edges))])
    taken = linear_sum_assignment(loss[:, seats].cpu().numpy())[1]
    return seats[torch.from_numpy(taken)]


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two heads over more tokens than a window and the sinks hold."""
    from sparsify_compiler.passes.attention.select_blocks import Attention

    torch.manual_seed(0)
    return Attention().eval(), (torch.randn(1, 640, 16),)
