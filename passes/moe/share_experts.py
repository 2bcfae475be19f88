"""Experts that share an FFN: it stays as it is, and what it gives is changed by the experts that a row chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.passes.moe._evidence import Evidence, Formula
from sparsify_compiler.passes.moe._sites import Dense, dense_of, gather
from sparsify_compiler.passes.moe._write import Routing, is_shared, write_shared
from sparsify_compiler.passes.moe.routers._base import Task
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Stage

KINDS = {"kind": "shared expert", "router": "router", "selector": "expert selector", "weight": "expert weight"}  # option -> kind of the catalogue


@dataclass(frozen=True)
class ShareExperts(Pass):
    """Give each FFN experts that differ little: adapters or modulations of what it gives, of which a row takes those that a router chooses.

    Matches    linear(act(linear(x, gate)) * linear(x, up), down), and without a gate linear(act(linear(x, up)), down)
    Rewrites   y = ffn(x): sum over the chosen experts of weights * (y + up[e] gelu(down[e] y)), or of weights * (scale[e] y + shift[e])
    Preserves  signature; at the beginning, with weights that sum up to 1, also values
    Paper      PESC, Wu et al., arXiv:2401.02731; MoFME, Zhang et al., arXiv:2312.16610

    experts   how many
    kind      a file of passes/moe/shared_experts: how they differ
    router    a file of passes/moe/routers that asks nothing of calibration, of what the FFN reads
    selector  a file of passes/moe/selectors, which says itself how many it takes: "top_k(k=2)"
    weight    a file of passes/moe/weights
    targets   selectors of FFN sites; all by default
    ignore    selectors of FFN sites that have no experts

    It is for training: sc.attach() alone, or before a pass that masks the FFN, which leaves the router out by ignore=["*.router"]; an FFN that is
    masked already is left alone.
    """

    experts: int = 8
    kind: str = "adapter"
    router: str = "random"
    selector: str = "top_k(k=2)"
    weight: str = "normalised"
    targets: tuple[str, ...] = ("ffn",)
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        named = {option: Named.parse(kind, getattr(self, option)) for option, kind in KINDS.items()}
        if self.experts < 1:
            raise ParseError(f"experts is 1 or more, got {self.experts}", where="share_experts")
        if named["router"].statistics or named["router"].name == "oracle":
            raise ParseError(f"router {self.router} looks at neurons of experts, and these have none", where="share_experts", hint="router='random'")
        if not named["selector"].options.get("k"):
            raise ParseError(f"selector {self.selector} does not say how many experts it takes", where="share_experts", hint="selector='top_k(k=2)'")
        self.take_selectors("targets", "ignore")

    def run(self, program: Program, ctx: Context) -> Program:
        found: list[Dense] = []
        for site in self.ffns(program, ctx):
            dense = dense_of(program.regions[site.region], site, self.name())
            if isinstance(dense, Dense) and is_shared(dense.down):
                ctx.miss("experts share it already", site.path)
            elif isinstance(dense, str):
                ctx.miss(dense, site.path)
            elif ctx.spend():
                found.append(dense)
        for dense, evidence in gather(program, found, frozenset(), ctx):
            self._share(program, dense, evidence)
        return program

    def _share(self, program: Program, dense: Dense, evidence: Evidence) -> None:
        kind, router, select, weight = (Named.parse(KINDS[option], getattr(self, option)) for option in KINDS)
        empty = torch.zeros(0, self.experts, dtype=torch.float32)
        table = torch.full((self.experts, 1), -1, dtype=torch.int64)
        scores: Formula = router(Task(evidence, table, 1.0, empty, "output"))
        weighted = weight(self.experts) or Formula({}, _ones)
        made: Formula = kind.function(dense.ffn.down.shape[0], self.experts, evidence.generator(), **kind.options)
        write_shared(dense, Routing(scores, Formula({}, lambda scores: select(scores, 0)), weighted), made, self.name())
        row = program.decisions.get(dense.site.path) or Decision.of(dense.site.path, "ffn", dense.ffn.down)
        row.structure, row.reason = f"{self.experts} experts share it", f"each a {kind.name}; router {router.name}, {self.selector}"
        program.decisions[dense.site.path] = row


def _ones(scores: Tensor, chosen: Tensor) -> Tensor:
    return torch.ones_like(chosen, dtype=scores.dtype)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A gated FFN of 64 neurons."""
    from sparsify_compiler.passes.activation.select_neurons import GatedFfn

    torch.manual_seed(0)
    return GatedFfn(16, 64).eval(), (torch.randn(40, 16),)
