"""The blocks of a model as things that a text or a token may be routed around."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sparsify_compiler.calibrate_rows import collect_rows
from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import CalibrationError, ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.normal_form_edit import only_user
from sparsify_compiler.ops import put_part
from sparsify_compiler.part_run import TEXTS, Part
from sparsify_compiler.passes.activation._units import in_groups
from sparsify_compiler.passes.moe._evidence import Evidence, Ffn, Formula
from sparsify_compiler.passes.moe._placed import Placed
from sparsify_compiler.passes.moe.routers._base import Task
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region
from sparsify_compiler.site_block import find_blocks
from sparsify_compiler.sites import find_sites
from sparsify_compiler.splice import insert_formula

ROUTERS = ("ridge", "random")  # those that look at no neurons, and need no second block to compare one with


@dataclass(frozen=True)
class Depth:
    """A residual block, and its stretch of the graph."""

    path: str
    part: Part

    @property
    def region(self) -> Region:
        """The graph that it lies in."""
        return self.part.region

    @property
    def width(self) -> int:
        """Features of the stream."""
        return int(self.part.start.meta["val"].shape[-1])

    @property
    def bytes_a_row(self) -> int:
        """Of what calibration keeps."""
        return 4 * (self.width + 1)

    def leaves(self) -> tuple[fx.Node, ...]:
        """The parameters that it computes with."""
        return tuple(source for node in self.part.inside for source in node.all_input_nodes if source.op == "get_attr")

    def placed(self, before: fx.Node, by: str) -> Placed:
        """Where what routes to it is written."""
        return Placed(self.region, before, self.path.partition("@")[0], self.leaves(), self.part.start.meta["val"].dtype, by)

    def decide(self, program: Program, density: float, budget: float, reason: str) -> None:
        """Its row of the report."""
        dtype = str(self.part.start.meta["val"].dtype).removeprefix("torch.")
        program.decisions[self.path] = Decision(self.path, "block", (self.width,), dtype, "routed", density, budget, "rows", reason=reason)


def depths(program: Program, dim: int, ctx: Context, by: str) -> list[Depth]:
    """The blocks that can run on a part of the texts or tokens, in order; a miss for each of the others, and where there are none.

    None where the pass `by` was here before: which blocks it left as they are was its choice.
    """
    found: list[Depth] = []
    if any(node.target is put_part.op and node.meta.get("by") == by for _, node in program.nodes()):
        ctx.miss("its blocks are routed already")
        return found
    normed = {(site.region, site.roles["add"]) for site in find_sites(program, ("residual",)) if site.facts["norm"] == "post"}
    for block in find_blocks(program):
        region = program.regions[block.region]
        end = region.node(block.output)
        if (block.region, block.output) in normed:  # a norm behind the sum is a part of the block
            end = only_user(end) or end
        part = Part.of(region, region.node(block.input), end, dim)
        if isinstance(part, str):
            ctx.miss(part, block.path)
        else:
            found.append(Depth(block.path, part))
    if not found and not ctx.misses:
        ctx.miss("the model has no residual blocks in one graph")
    return found


def check_router(router: str, where: str) -> Named:
    """Raises ParseError."""
    named = Named.parse("router", router)
    if named.name not in ROUTERS:
        raise ParseError(f"router {router} does not route to blocks", where=where, hint=f"one of {', '.join(ROUTERS)}")
    return named


def seen(program: Program, found: Sequence[Depth], ctx: Context, wanted: Named | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of a block -> float32 [R, width], what a router reads, and [R, 1], by how much of its length the block changes the stream there.

    A row is a token, or a text, for which both are means over its tokens. wanted: a token importance in place of the change, which the blocks have.
    Raises CalibrationError without batches.
    """
    if not ctx.batches:
        raise CalibrationError("blocks are run to see how much they change, and there are no batches", where=found[0].path,
                               hint="give calibration=batches")
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    for group in in_groups(list(found), ctx.batches):
        watched = program.clone()
        places = {one.path: _watch(watched.regions[one.region.path], one, wanted) for one in group}
        values, _ = collect_rows(watched, ctx.batches, [place for pair in places.values() for place in pair])
        rows |= {path: (values[x], values[change]) for path, (x, change) in places.items()}
    return rows


def _watch(region: Region, one: Depth, wanted: Named | None) -> tuple[tuple[str, str], tuple[str, str]]:
    start, end = region.node(one.part.start.name), region.node(one.part.end.name)
    texts = one.part.dim == TEXTS
    formula, given = (text_change if texts else token_change, {"x": start, "y": end}) if wanted is None else wanted(region, one)
    x = insert_formula(region, end.next, mean_of_texts, {"x": start}, "watch") if texts else start
    found = insert_formula(region, end.next, formula, given, "watch")
    return (region.path, x.name), (region.path, found.name)


def mean_of_texts(x: Tensor) -> Tensor:
    """[B, T, width] -> [B, 1, width]."""
    return x.mean(1, keepdim=True)


def token_change(x: Tensor, y: Tensor) -> Tensor:
    """||y - x|| / ||x|| of each row: [..., width] -> [..., 1], float32."""
    x, y = x.float(), y.float()
    found: Tensor = torch.linalg.vector_norm(y - x, dim=-1, keepdim=True) / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
    return found


def text_change(x: Tensor, y: Tensor) -> Tensor:
    """The mean of that over a text's tokens: [B, 1, 1]."""
    return token_change(x, y).mean(1, keepdim=True)


def router_of(router: Named, width: int, x: Tensor, wanted: Tensor, share: float, seed: int) -> Formula:
    """A router of x [R, width] that scores wanted [R, E]; R may be 0 for one that asks nothing."""
    ffn = Ffn(torch.zeros(1, width, dtype=torch.float32), torch.zeros(width, 1, dtype=torch.float32), "relu")
    evidence = Evidence(ffn, x, torch.zeros(x.shape[0], 1, dtype=torch.float32), seed=seed)
    made: Formula = router(Task(evidence, torch.full((wanted.shape[1], 1), -1, dtype=torch.int64), share, wanted, "output"))
    return made


def unseen(width: int, experts: int) -> tuple[Tensor, Tensor]:
    """What stands for rows where nobody asks for them."""
    return torch.zeros(0, width, dtype=torch.float32), torch.zeros(0, experts, dtype=torch.float32)


def moved(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """x + weight (y - x)."""
    return x + weight.to(x.dtype) * (y - x)
