"""Let each row run through slices of its FFN, or through all of it several times, as hard as the row is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.normal_form_edit import insert
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.part_run import between
from sparsify_compiler.passes.moe._evidence import Evidence, Formula
from sparsify_compiler.passes.moe._placed import Placed
from sparsify_compiler.passes.moe._sites import Dense, dense_of
from sparsify_compiler.passes.moe._write import LOOPS, SCORES
from sparsify_compiler.passes.moe.routers._base import normal, scored
from sparsify_compiler.passes.moe.selectors.top_k import top_k
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Site, Stage
from sparsify_compiler.sites import find_sites

KIND = ("ffn",)


@dataclass(frozen=True)
class ReuseFfns(Pass):
    """Let a router say of each row how often it runs through its FFN, and mix that with slices of the same FFN, the more the fewer loops it has.

    Matches    x + ffn(norm(x)), with and without a gate, a norm or biases
    Rewrites   x + loops / most * (y1 + y2 + .. ) + (1 - loops / most) * sum of weights * slice(norm(x)), where y1 = ffn(norm(x)) and the others are
               ffn(norm(x + all before)), computed for rows with so many loops alone; slices and loops are views of the weights that were there
    Preserves  signature
    Paper      VersatileFFN, Nie et al., arXiv:2512.14531

    slices   how many equal parts the neurons are divided into, as they stand
    top_k    how many of them a row runs through
    loops    how often a row may run through the whole FFN, at most
    targets  selectors of FFN sites; all by default
    ignore   selectors of FFN sites that stay dense

    Both routers are random, to be trained: draw_loops() lets the number of loops learn. Rows with the most loops still compute slices, of weight 0.
    """

    slices: int = 8
    top_k: int = 2
    loops: int = 4
    targets: tuple[str, ...] = KIND
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.slices or self.loops < 2:
            raise ParseError(f"top_k lies between 1 and slices, and loops is 2 or more; got {self.top_k}, {self.slices} and {self.loops}",
                             where=self.name())
        self.take_selectors("targets", "ignore")

    def run(self, program: Program, ctx: Context) -> Program:
        blocks = {(site.region, site.roles["branch"]): site for site in find_sites(program, ("residual",))}
        for site in self.ffns(program, ctx):
            dense = dense_of(program.regions[site.region], site, self.name())
            block = blocks.get((site.region, site.roles["down"]))
            why = self._unfit(dense, block)
            if why is not None:
                ctx.miss(why, site.path)
            elif isinstance(dense, Dense) and block is not None and ctx.spend():
                _Reuse(self, dense, block, ctx.seed).write()
                row = program.decisions[site.path] = Decision.of(site.path, "ffn", dense.ffn.down)
                row.structure = f"{self.top_k} of {self.slices} slices, up to {self.loops} loops"
                row.reason = "by routers that are to be trained"
        return program

    def _unfit(self, dense: Dense | str, block: Site | None) -> str | None:
        if isinstance(dense, str):
            return dense
        if block is None:
            return "no sum with what goes by it follows it in its graph"
        if dense.region.node(block.roles["add"]).meta.get("by") == self.name():
            return "its rows loop already"
        return f"{dense.ffn.neurons} neurons make no {self.slices} slices" if dense.ffn.neurons % self.slices else None


class _Reuse:
    """One FFN in its residual block."""

    def __init__(self, of: ReuseFfns, dense: Dense, block: Site, seed: int) -> None:
        self._of, self._dense, self._block, self._seed = of, dense, block, seed
        self._region, self._stream, self._add = dense.region, dense.region.node(block.roles["input"]), dense.region.node(block.roles["add"])
        self._cut: dict[int, dict[str, Any]] = {}
        path = dense.site.path.partition("@")[0]
        self._placed = Placed(self._region, self._add, path, tuple(dense.leaves()), self._stream.meta["val"].dtype, of.name())

    def write(self) -> None:
        down, most = self._dense.down, self._of.loops
        scores = self._scored("loops", most, self._stream)
        share = self._formula("loops", Formula({}, one_of), scores=scores)
        deep, state = down, self._formula("loops", Formula({}, _added), x=self._stream, y=down)
        for loop in range(2, most + 1):
            chosen = self._formula("loops", Formula({}, partial(at_least, loop=loop)), share=share)
            y = self._experts(self._normed(state), chosen, None, 1)
            deep = self._formula("loops", Formula({}, partial(_further, loop=loop)), total=deep, y=y, share=share)
            state = self._formula("loops", Formula({}, _added), x=state, y=y)
        wide = self._wide()
        self._add.replace_input_with(down, self._formula("loops", Formula({}, _mixed), deep=deep, wide=wide, share=share))

    def _wide(self) -> fx.Node:
        scores = self._scored("router", self._of.slices, self._stream)
        chosen = self._formula("router", Formula({}, partial(_best, k=self._of.top_k)), scores=scores)
        weight: Formula = Named.parse("expert weight", "normalised")(self._of.slices)
        weights = self._formula("router", weight, scores=scores, chosen=chosen)
        y = self._experts(self._dense.x, chosen, weights, self._of.slices)
        y.meta["site"] = self._dense.site.path
        return y

    def _scored(self, part: str, outputs: int, x: fx.Node) -> fx.Node:
        width = int(x.meta["val"].shape[-1])
        empty = torch.zeros(0, width, dtype=torch.float32)
        evidence = Evidence(self._dense.ffn, empty, empty, seed=self._seed + outputs)
        scores = self._formula(part, Formula({"weight": normal((outputs, width), evidence)}, scored), x=x)
        scores.meta[SCORES] = True
        return scores

    def _normed(self, state: fx.Node) -> fx.Node:
        """What the FFN would read of another state of the stream."""
        new = {self._stream: state}
        for node in between(self._region, self._stream, self._dense.x) if self._dense.x is not self._stream else ():
            with self._region.graph.inserting_before(self._add):
                new[node] = self._region.graph.node_copy(node, lambda one: new.get(one, one))
            new[node].meta["by"] = self._of.name()
        return new[self._dense.x]

    def _experts(self, x: fx.Node, chosen: fx.Node, weights: fx.Node | None, experts: int) -> fx.Node:
        """So many equal slices of the FFN on rows that chose them, each with the whole of its last bias."""
        if experts not in self._cut:
            self._cut[experts] = self._slices(experts)
        op = insert(self._add, experts_ffn.op, x=x, chosen=chosen, weights=weights, **self._cut[experts], activation=self._dense.activation)
        op.meta |= {"by": self._of.name(), "path": self._placed.at("slices" if weights else "loops"), LOOPS: weights is None}
        return op

    def _slices(self, experts: int) -> dict[str, Any]:
        given: dict[str, Any] = {"up": None}
        for role, (linear, rows) in self._dense.parts.items():
            cut = _down if role == "down" else partial(_rows, rows=rows)
            given[role] = self._formula("slices", Formula({}, partial(cut, experts=experts)), weight=linear.kwargs["weight"])
            if isinstance(bias := linear.kwargs.get("bias"), fx.Node):
                name, made = ("bias", _every) if role == "down" else (f"{role}_bias", partial(_rows, rows=rows))
                given[name] = self._formula("slices", Formula({}, partial(made, experts=experts)), weight=bias)
        if given["up"] is not None and "gate_bias" in given and "up_bias" not in given:
            given["up_bias"] = self._formula("slices", Formula({}, _zeros), like=given["gate_bias"])
        return given

    def _formula(self, part: str, formula: Formula, **inputs: Any) -> fx.Node:
        known: Mapping[str, fx.Node] = inputs
        return self._placed.formula(part, formula, known, {})


def one_of(scores: Tensor) -> Tensor:
    """1 for the highest score of a row and 0 for the others: [..., n] -> the same."""
    return torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)


def at_least(share: Tensor, loop: int) -> Tensor:
    """int64 [..., 1]: 0, the one expert there is, for rows of so many loops or more, else -1."""
    return (share[..., loop - 1 :].amax(-1, keepdim=True) > 0).long() - 1


def _added(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like)


def _further(total: Tensor, y: Tensor, share: Tensor, loop: int) -> Tensor:
    return total + share[..., loop - 1 :].sum(-1, keepdim=True).to(y.dtype) * y


def _mixed(deep: Tensor, wide: Tensor, share: Tensor) -> Tensor:
    most = share.shape[-1]
    part = (share * torch.arange(1, most + 1, dtype=share.dtype, device=share.device)).sum(-1, keepdim=True).to(deep.dtype) / most
    return part * deep + (1 - part) * wide


def _best(scores: Tensor, k: int) -> Tensor:
    return top_k(scores, k)


def _rows(weight: Tensor, rows: slice, experts: int) -> Tensor:
    part = weight[rows]
    return part.reshape(experts, part.shape[0] // experts, *part.shape[1:])


def _down(weight: Tensor, experts: int) -> Tensor:
    return weight.reshape(weight.shape[0], experts, -1).transpose(0, 1)


def _every(weight: Tensor, experts: int) -> Tensor:
    return weight.expand(experts, -1)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An FFN of 64 neurons on the residual stream."""
    from sparsify_compiler.passes.activation.select_neurons import GatedFfn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.ffn = nn.LayerNorm(16), GatedFfn(16, 64)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = x + self.ffn(self.norm(x))
            return found

    torch.manual_seed(0)
    return Block().eval(), (torch.randn(40, 16),)
