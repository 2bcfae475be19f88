"""Let attention read some blocks of keys only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsify_compiler.indexer import Indexer
from sparsify_compiler.passes.attention._calibration import calibrated
from sparsify_compiler.passes.attention._sites import KIND, attention_sites, give_indexer
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.sliding_window import SlidingWindow
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Stage


@dataclass(frozen=True)
class SelectBlocks(Pass):
    """Attend to the blocks of keys that a pattern or an indexer chooses, in graphs and in attentions that stay eager Python.

    Matches    scaled_dot_product_attention(query, key, value, attn_mask); attentions that ask Hugging Face's registry for their function
    Rewrites   attend(query, key, value, attn_mask, indexer=Indexer(always, scorer, selector, block_q, block_k, dense_below))
    Preserves  signature; quality is measured
    Paper      none: the frame that StreamingLLM (arXiv:2309.17453), BigBird (arXiv:2007.14062), MInference (arXiv:2407.02490) and others fill in

    always           patterns, files of passes/attention/patterns, whose union every query reads
    scorer           a file of passes/attention/scorers, or "" for the patterns alone; some learn from the calibration batches
    selector         a file of passes/attention/selectors, which goes with a scorer
    block_q, block_k rows of queries and keys that are chosen together
    orders           files of passes/attention/orders, which the attentions take in turn; all that is said of blocks is said of tokens in that order
    rest             a file of passes/attention/rests, which stands for the blocks that are not read, or ""
    dense_below      attention over fewer keys than this stays dense; by default lower() measures where that is faster. 0 for a model that was trained
                     with the pattern: dense attention would be another function
    targets          selectors of attention sites; all by default
    ignore           selectors of attention sites that stay dense
    """

    always: tuple[Any, ...] = (SlidingWindow(512), Sinks(64))
    scorer: str = ""
    selector: str = ""
    block_q: int = 64
    block_k: int = 64
    orders: tuple[str, ...] = ()
    rest: str = ""
    dense_below: int | None = None
    targets: tuple[str, ...] = KIND
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        self.take_selectors("targets", "ignore", "orders")
        self._indexers()

    def _indexers(self) -> list[Indexer]:
        """The indexers that the attentions take in turn."""
        one = Indexer(self.always, self.scorer, self.selector, self.block_q, self.block_k, self.dense_below, self.dense_below, rest=self.rest)
        return [replace(one, order=order) for order in self.orders or ("",)]

    def run(self, program: Program, ctx: Context) -> Program:
        sites, indexers = attention_sites(program, ctx, self.targets, self.ignore), self._indexers()
        for turn, indexer in enumerate(indexers):
            taken = sites[turn::len(indexers)]
            found = calibrated(indexer, program, taken, ctx)
            for site in taken:
                if ctx.spend():
                    give_indexer(program, site, found[site.path][0], self.name(), found[site.path][1])
        return program


class Attention(nn.Module):
    """Causal attention of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:-1], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y: Tensor = self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return y


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Attention over more tokens than the window and the sinks hold."""
    torch.manual_seed(0)
    return Attention().eval(), (torch.randn(1, 640, 16),)
