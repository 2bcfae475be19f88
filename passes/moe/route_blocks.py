"""Route texts to some of the blocks of each group: a mixture of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.errors import ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.ops import open_texts, put_part, take_part
from sparsify_compiler.part_run import TEXTS
from sparsify_compiler.passes.moe import route_tokens
from sparsify_compiler.passes.moe._depth import Depth, check_router, depths, mean_of_texts, moved, router_of, seen, unseen
from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Stage


@dataclass(frozen=True)
class RouteBlocks(Pass):
    """Let each text run through some blocks of every group of consecutive ones: those that a router scores highest from what the group reads.

    Matches    blocks of the residual stream [texts, tokens, width], one after the other
    Rewrites   each block of a group: put_part(x, xs + weight * (block(xs) - xs), index) on the texts that chose it; scores = router(mean of stream)
    Preserves  signature; quality is measured, and with a density of 1 it is the model
    Paper      Dense2MoE, Zheng et al., arXiv:2510.09094, whose mixture of blocks this is

    density   blocks that a text runs through / all that can run on some texts; by default the user's budget
    group     blocks of a group; what is left over at the end is run by all
    router    "ridge", fitted to how much each block changes a text, or "random", to be trained
    selector  a file of passes/moe/selectors
    weight    a file of passes/moe/weights: "one", or one by which routers learn
    first     so many blocks at the beginning that every text runs through
    last      the same, at the end

    A text that is alone in its batch leaves out whole blocks. Calibration sees each text once: give many. Without rows of calibration the router is
    random.
    """

    density: float | None = None
    group: int = 4
    router: str = "ridge"
    selector: str = "top_k"
    weight: str = "one"
    first: int = 0
    last: int = 0

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        check_router(self.router, self.name())
        Named.parse("expert selector", self.selector)
        Named.parse("expert weight", self.weight)
        if self.group < 2 or self.first < 0 or self.last < 0:
            raise ParseError(f"a group has 2 blocks or more, first and last lie at 0 or above; got {self.group}, {self.first}, {self.last}",
                             where=self.name())
        self.check_density(self.density)

    def run(self, program: Program, ctx: Context) -> Program:
        density, found = self.density_of(ctx), depths(program, TEXTS, ctx, self.name())
        groups = self._groups(found)
        routed = self.group * len(groups)
        share = round(1 - (1 - density) * len(found) / max(routed, 1), 9)
        if found and not groups:
            ctx.miss(f"{len(found)} blocks make no group of {self.group} behind the first and before the last", found[0].path)
        elif groups and share <= 0:
            ctx.miss(f"{routed} of {len(found)} blocks in groups cannot bring a text to a density of {density:.3g}", groups[0][0].path)
        elif groups:
            rows = seen(program, [one for group in groups for one in group], ctx) if check_router(self.router, self.name()).statistics else {}
            for group in reversed([group for group in groups if ctx.spend()]):  # a block behind reads what stands for the one before
                self._route(program, group, rows, share, density, ctx)
        return program

    def _groups(self, found: Sequence[Depth]) -> list[list[Depth]]:
        """Of blocks that follow each other without a gap."""
        groups: list[list[Depth]] = []
        able, own = list(found[self.first : len(found) - self.last]), list[Depth]()
        for one in able:
            own = [*own, one] if own and own[-1].region is one.region and own[-1].part.end is one.part.start else [one]
            if len(own) == self.group:
                groups.append(own)
                own = []
        return groups

    def _route(self, program: Program, group: list[Depth], rows: Mapping[str, tuple[Tensor, Tensor]], share: float, density: float,
               ctx: Context) -> None:
        head = group[0]
        x = rows[head.path][0] if rows else unseen(head.width, 0)[0]
        wanted = torch.cat([rows[one.path][1] for one in group], 1) if rows else unseen(head.width, self.group)[1]
        router = router_of(check_router(self.router, self.name()), head.width, x, wanted, share, ctx.seed)
        select, weight = Named.parse("expert selector", self.selector), Named.parse("expert weight", self.weight)(self.group)
        random = torch.randn(64, self.group, generator=torch.Generator().manual_seed(ctx.seed), dtype=torch.float32)
        known = router.function(x, **router.tensors) if rows else random
        number = select.module.calibrate(known, share, **select.options)
        open_ = float((select(known, number) >= 0).float().sum(-1).mean()) / self.group
        placed = head.placed(head.part.inside[0], self.name())
        mean = placed.formula("router", Formula({}, mean_of_texts), {"x": head.part.start}, {})
        scores = placed.formula("router", router, {"x": mean}, {})
        chosen = placed.formula("router", Formula({}, lambda scores: select(scores, number)), {"scores": scores}, {})
        given = {"chosen": chosen}
        if weight is not None:
            given["weights"] = placed.formula("router", weight, {"scores": scores, "chosen": chosen}, {})
        shares = [placed.formula("router", Formula({}, partial(_share_of, block=at)), given, {}) for at in range(self.group)]
        for one, weights in reversed(list(zip(group, shares, strict=True))):
            self._around(one, weights)
        for one in group:
            why = f"a text runs through {open_ * self.group:.3g} of {self.group} blocks; router {self.router}, {self.selector}"
            one.decide(program, open_, density, why)

    def _around(self, one: Depth, weights: fx.Node) -> None:
        """The block on the texts whose weight is not 0."""
        part, readers = one.part, list(one.part.end.users)
        placed = one.placed(part.inside[0], self.name())
        index = placed.formula("router", Formula({}, _open), {"weights": weights}, {})
        stream = part.run_on(index, self.name())
        behind = one.placed(part.end.next, self.name())
        taken = behind.formula("router", Formula({}, partial(take_part.op, dim=TEXTS)), {"x": weights, "index": index}, {})
        end = behind.formula("", Formula({}, moved), {"x": stream, "y": part.end, "weight": taken}, {})
        new = behind.formula("", Formula({}, put_part.op), {"x": part.start, "y": end, "index": index}, {})
        for reader in readers:
            reader.replace_input_with(part.end, new)


def _share_of(chosen: Tensor, weights: Tensor | None = None, *, block: int) -> Tensor:
    """[B, 1, 1]: the weight that each text gives a block, 0 where it did not choose it."""
    mine = (chosen == block).float()
    return (mine if weights is None else mine * weights).sum(-1, keepdim=True)


def _open(weights: Tensor) -> Tensor:
    return open_texts.op(weights[:, 0, 0])  # type: ignore[no-any-return]


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Four blocks over three texts of 20 tokens."""
    torch.manual_seed(0)
    return nn.Sequential(*[route_tokens.Block(16, 4) for _ in range(4)]).eval(), (torch.randn(3, 20, 16),)
