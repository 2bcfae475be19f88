"""Let each FFN compute, while a text goes on, only the neurons that the text's prompt used most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import ParseError
from sparsify_compiler.fold import erase_dead, evaluate
from sparsify_compiler.ops import held_ffn, take_rows
from sparsify_compiler.passes.lower._selected_ffn import activation_of_ffn
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Region, Site, Stage
from sparsify_compiler.sites import op_paths

KIND = ("ffn",)


@dataclass(frozen=True)
class HoldNeurons(Pass):
    """Choose the neurons of each FFN once a text, by what its prompt used most, and compute those alone while the text goes on.

    Matches    linear(act(linear(x, gate)) * linear(x, up), down), and without a gate linear(act(linear(x, up)), down)
    Rewrites   sparsify.held_ffn(x, up, down, gate, ...): whole on a prompt, whose tokens vote; later on the neurons of most votes
    Preserves  signature; quality is measured
    Paper      CoreInfer, Wang et al., arXiv:2410.18311

    density  held / all neurons, the same in every FFN; by default the user's budget
    share    of a token's positive neurons, those that it votes for, the largest ones; 0 lets each token vote for all neurons, with the square of what
             they add to the output
    prompt   a call of so many tokens is a prompt too: it is computed whole, and its votes are added to those of the text
    targets  selectors of FFN sites; all by default
    ignore   selectors of FFN sites that compute all of their neurons

    A text is known by its cache (session.py). Where the model was captured whole it has none: a call is a prompt, and nothing is skipped.
    """

    density: float | None = None
    share: float = 0.4
    prompt: int = 32
    targets: tuple[str, ...] = KIND
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.prompt < 2:
            raise ParseError(f"share lies between 0 and 1 and prompt is 2 or more, got {self.share} and {self.prompt}", where="hold_neurons")
        self.take_selectors("targets", "ignore")
        self.check_density(self.density)

    def run(self, program: Program, ctx: Context) -> Program:
        density = self.density_of(ctx)
        paths = op_paths(program)
        for site in self.ffns(program, ctx):
            region = program.regions[site.region]
            down = region.node(site.roles["down"])
            activation = activation_of_ffn(region, site)
            why = _unfit(region, site, activation)
            if why is not None:
                ctx.miss(why, site.path)
            elif ctx.spend():
                path, weight = paths[site.region, down.name], evaluate(region, down.kwargs["weight"])  # type: ignore[arg-type]
                row = program.decisions.setdefault(path, Decision.of(path, "linear", weight))
                row.structure, row.density, row.budget = "neurons held", density, density
                self._hold(region, site, down, activation, density, path)
        if program.skeleton is None and program.decisions:
            ctx.miss("the model was captured whole, without a cache: every call is a prompt, which is computed whole")
        return program

    def _hold(self, region: Region, site: Site, down: fx.Node, activation: str, density: float, path: str) -> None:
        parts = {role: region.node(site.roles[role]) for role in ("up", "gate") if role in site.roles}
        given: dict[str, Any] = {"x": parts["up"].kwargs["input"]} | {role: node.kwargs["weight"] for role, node in parts.items()}
        given |= {f"{role}_bias": node.kwargs.get("bias") for role, node in parts.items()}
        given |= {"down": down.kwargs["weight"], "bias": down.kwargs.get("bias")}
        options: dict[str, Any] = {"activation": activation, "density": density, "share": self.share, "prompt": self.prompt, "key": site.path}
        with region.graph.inserting_before(down):
            held = region.graph.call_function(held_ffn.op, (), {key: value for key, value in given.items() if value is not None} | options)
        held.meta = {**down.meta, "by": self.name(), "site": path}
        down.replace_all_uses_with(held)
        erase_dead([down])
        held.name = site.roles["down"]


def _unfit(region: Region, site: Site, activation: str) -> str | None:
    source = region.node(site.roles["up"]).kwargs["input"]
    if isinstance(source, fx.Node) and source.target is take_rows.op:
        return "it runs on a part of the rows, whose texts are not told apart"
    if site.facts["fused"]:
        return "its gate and up projections are one linear"
    if not activation:
        return f"its activation is {site.facts['activation']}, or more than that"
    nodes = [region.node(site.roles[role]) for role in ("gate", "up", "down") if role in site.roles]
    stored = all(isinstance(weight := node.kwargs["weight"], fx.Node) and weight.op == "get_attr" for node in nodes)
    return None if stored and len(nodes[-1].meta["val"].shape) == 3 else "its weights are not stored, or its input is not [batch, tokens, width]"


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A gated FFN over two texts of 6 tokens."""
    from sparsify_compiler.passes.activation.select_neurons import GatedFfn

    torch.manual_seed(0)
    return GatedFfn(16, 32).eval(), (torch.randn(2, 6, 16),)
