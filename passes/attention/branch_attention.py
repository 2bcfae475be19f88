"""Let attention be several branches that are trained with the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsify_compiler.branches import GATE, Branches
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.passes.attention._sites import KIND, attention_sites, give_indexer, shape_of
from sparsify_compiler.passes.attention.branches.compressed import Compressed
from sparsify_compiler.passes.attention.patterns.sliding_window import SlidingWindow
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Stage


@dataclass(frozen=True)
class BranchAttention(Pass):
    """Attend in several branches, whose outputs gates add up; the model is trained afterwards.

    Matches    scaled_dot_product_attention(query, key, value, attn_mask); attentions that ask Hugging Face's registry for their function
    Rewrites   attend(query, key, value, attn_mask, learned, indexer=Branches(parts, merge))
    Preserves  signature; quality comes with training
    Paper      none: the frame that NSA (arXiv:2502.11089) fills in

    parts    Indexers, and branches of passes/attention/branches
    merge    "gates", each a sigmoid of a linear map of the query, one for each head and branch; or "lse", exact for branches over disjoint keys
    targets  selectors of attention sites; all by default
    ignore   selectors of attention sites that stay dense

    What is learned is among the parameters of sc.attach()'s module, and starts as means of windows and gates that weigh all branches alike.
    """

    parts: tuple[Any, ...] = (Compressed(), Indexer(always=(SlidingWindow(512),)))
    merge: str = "gates"
    targets: tuple[str, ...] = KIND
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        self.take_selectors("targets", "ignore")
        Branches(self.parts, self.merge)

    def run(self, program: Program, ctx: Context) -> Program:
        branches = Branches(self.parts, self.merge)
        for site in attention_sites(program, ctx, self.targets, self.ignore):
            if ctx.spend():
                *shape, dtype = shape_of(program, site)
                learned = {name: nn.Parameter(tensor.to(dtype)) for name, tensor in self._initial(branches, *shape).items()}
                give_indexer(program, site, branches, self.name(), learned)
        return program

    def _initial(self, branches: Branches, heads: int, groups: int, width: int, value_width: int) -> dict[str, Tensor]:
        """What the branches learn, before they do. The gates of all branches are 1 / their number."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            if hasattr(part, "initial"):
                found |= part.initial(heads, groups, width, value_width)
        if branches.merge == "gates":
            share = torch.tensor(1 / len(self.parts), dtype=torch.float32).clamp(max=1 - 1e-3)
            weight, bias = GATE
            found[weight] = torch.zeros(heads, width, len(self.parts), dtype=torch.float32)
            found[bias] = torch.logit(share).repeat(heads, len(self.parts))
        return found


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two heads over some windows of keys."""
    from sparsify_compiler.passes.attention.select_blocks import Attention

    torch.manual_seed(0)
    return Attention().eval(), (torch.randn(1, 80, 16),)
