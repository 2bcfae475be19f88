"""Let attention read some blocks of keys only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.decision import Decision
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.library_attention import find_library_attentions
from sparsify_compiler.normal_form_edit import argument, insert
from sparsify_compiler.ops import attend
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.sliding_window import SlidingWindow
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Region, Site, Stage
from sparsify_compiler.selectors import select
from sparsify_compiler.sites import find_sites

KIND = ("attention",)


@dataclass(frozen=True)
class SelectBlocks(Pass):
    """Attend to the blocks of keys that a pattern or an indexer chooses, in graphs and in attentions that stay eager Python.

    Matches    scaled_dot_product_attention(query, key, value, attn_mask); attentions that ask Hugging Face's registry for their function
    Rewrites   attend(query, key, value, attn_mask, indexer=Indexer(always, scorer, selector, block_q, block_k, dense_below))
    Preserves  signature; quality is measured
    Paper      none: the frame that StreamingLLM (arXiv:2309.17453), BigBird (arXiv:2007.14062), MInference (arXiv:2407.02490) and others fill in

    always           patterns, files of passes/attention/patterns, whose union every query reads
    scorer           a file of passes/attention/scorers, or "" for the patterns alone
    selector         a file of passes/attention/selectors, which goes with a scorer
    block_q, block_k rows of queries and keys that are chosen together
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
    dense_below: int | None = None
    targets: tuple[str, ...] = KIND
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        self.take_selectors("targets", "ignore")
        self._indexer()

    def _indexer(self) -> Indexer:
        return Indexer(self.always, self.scorer, self.selector, self.block_q, self.block_k, self.dense_below, self.dense_below)

    def run(self, program: Program, ctx: Context) -> Program:
        eager = {} if program.skeleton is None else find_library_attentions(program.skeleton)
        every = [*find_sites(program, KIND), *(Site("attention", path, "", {}, {"eager": True}) for path in eager)]
        sites = select(every, self.targets, self.ignore, program) if every or self.targets != KIND else []
        if not sites:
            ctx.miss("the model has no attention that can choose its blocks")
        for site in sites:
            why = eager[site.path] if "eager" in site.facts else _unfit(program.regions[site.region].node(site.roles["attention"]))
            if why is not None:
                ctx.miss(why, site.path)
            elif ctx.spend():
                self._rewrite(program, site)
        return program

    def _rewrite(self, program: Program, site: Site) -> None:
        text = str(self._indexer())
        if "eager" in site.facts:
            if site.path in program.attentions:
                return
            program.attentions[site.path] = text
        else:
            _attend(program.regions[site.region], site, text, self.name())
        what = [str(pattern) for pattern in self.always] + ([f"{self.selector} of {self.scorer}"] if self.scorer else [])
        program.decisions[site.path] = Decision(site.path, "attention", structure=" | ".join(what), format="by block", kernel="attend_blocks",
                                                reason="not measured")


def _attend(region: Region, site: Site, indexer: str, name: str) -> None:
    node = region.node(site.roles["attention"])
    given = {key: node.kwargs[key] for key in ("query", "key", "value", "attn_mask", "is_causal", "scale") if node.kwargs.get(key) is not None}
    made = insert(node, attend.op, node.meta["val"], **given, indexer=indexer)
    made.meta.update({"by": name, "site": site.path})
    node.replace_all_uses_with(made)
    region.graph.erase_node(node)


def _unfit(node: fx.Node) -> str | None:
    query, key = (node.kwargs[name].meta["val"].shape for name in ("query", "key"))  # type: ignore[union-attr]
    if len(query) != 4:
        return f"its queries have {len(query)} dimensions, not batch, heads, tokens and width"
    if argument(node, "dropout_p"):
        return "it drops shares at random"
    if argument(node, "is_causal") and query[2] != key[2]:
        return "it is causal with queries and keys of different lengths, which torch aligns at the start"
    return None


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
