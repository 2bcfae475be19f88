"""Route the tokens of each text around residual blocks: a mixture of depths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.errors import ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.normal_form_edit import same_size, shape
from sparsify_compiler.ops import put_part, take_part, top_tokens
from sparsify_compiler.part_run import TOKENS
from sparsify_compiler.passes.moe._depth import Depth, check_router, depths, moved, router_of, seen, unseen
from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Stage

TOKEN_SCORES = "scores of tokens"  # in the metadata of a choice of tokens: the name of the node of the router's own scores, [texts, tokens]
_Stored = tuple[Formula, dict[str, fx.Node]]  # a router, and the nodes of its tensors


@dataclass(frozen=True)
class RouteTokens(Pass):
    """Let each text run some of its tokens through a block, attention and all: those that a router scores highest; the others pass it by.

    Matches    x + attention(norm(x)), then + ffn(norm(..)), and whatever else a block of the residual stream [texts, tokens, width] is made of
    Rewrites   put_part(x, xs + weight * (block(xs) - xs), index); index = top_tokens(router(x), share), xs = take_part(x, index)
    Preserves  signature; quality is measured, and with a density of 1 it is the model
    Paper      Mixture-of-Depths, Raposo et al., arXiv:2404.02258; which blocks: gamma-MoD, Luo et al., arXiv:2410.13859

    density     tokens that blocks compute / all, over the blocks that can run on a part; by default the user's budget
    routed      share of the blocks that tokens may pass by, those of lowest importance
    importance  a file of passes/moe/block_importances
    router      "ridge", fitted to what is wanted, or "random", to be trained
    weight      a file of passes/moe/weights: "one", or "sigmoid" of the score, by which routers learn
    first       so many blocks at the beginning that every token runs through
    common      one router for all routed blocks of a graph that are as wide, fitted to all of them together, or trained by all
    keep        an input of the model [texts, tokens] by its name: tokens that are not 0 there come before all others: "attention_mask" leaves
                padding out first, a mark of the question's tokens keeps it whole
    wanted      a file of passes/moe/token_importances, which the router foretells: "change", how much the block changes a token, or "received",
                the attention that it gets there

    Tokens among those that are chosen see each other in attention, not the others. How many there are depends on the text's length alone; which,
    on all of the text, so this is for encoders, prompts and training, and not for generate(): there split_experts(experts=1, ...) routes around FFNs.
    Without keep, padding is scored like any token. Needs calibration, unless the router is random and all blocks are routed.
    """

    density: float | None = None
    routed: float = 0.75
    importance: str = "change"
    router: str = "ridge"
    weight: str = "one"
    first: int = 0
    common: bool = False
    keep: str = ""
    wanted: str = "change"

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        check_router(self.router, self.name())
        Named.parse("block importance", self.importance)
        Named.parse("expert weight", self.weight)
        Named.parse("token importance", self.wanted)
        if not 0 < self.routed <= 1 or self.first < 0:
            raise ParseError(f"routed lies above 0 and at most at 1, first at 0 or above; got {self.routed} and {self.first}", where=self.name())
        self.check_density(self.density)

    def run(self, program: Program, ctx: Context) -> Program:
        density, found = self.density_of(ctx), depths(program, TOKENS, ctx, self.name())
        chosen = self._chosen(program, found, ctx)
        share = round(1 - (1 - density) * len(found) / max(len(chosen), 1), 9)
        if found and not chosen:
            ctx.miss(f"a share of {self.routed:.3g} of {len(found)} blocks, behind the first {self.first}, is none", found[0].path)
        elif chosen and share <= 0:
            ctx.miss(f"{len(chosen)} of {len(found)} blocks cannot bring their tokens to a density of {density:.3g}: route more", chosen[0].path)
        elif chosen:
            able = [one for one in chosen if self._keeps(one, ctx) and self._tells(one, ctx)]
            rows = seen(program, able, ctx, Named.parse("token importance", self.wanted)) if self._router().statistics and able else {}
            done = [one for one in able if ctx.spend()]
            routers = self._routers(done, rows, share, ctx)
            for one in reversed(done):  # a block behind reads what stands for the one before
                self._route(one, routers[one.path], share)
            for one in done:
                one.decide(program, share, density, f"a text runs {share:.3f} of its tokens through it; router {self.router}, {self.importance}")
        return program

    def _chosen(self, program: Program, found: list[Depth], ctx: Context) -> list[Depth]:
        """The blocks of lowest importance among those behind the first ones."""
        able = found[self.first :]
        count = min(round(self.routed * len(found)), len(able))
        if not able or count == len(able):
            return able
        order = Named.parse("block importance", self.importance)(program, able, ctx).argsort(stable=True)
        return [able[i] for i in sorted(order[:count].tolist())]

    def _keeps(self, one: Depth, ctx: Context) -> bool:
        """Is there what tells the tokens to keep, if there is to be? A miss where the block's graph has no such input of its texts and tokens."""
        sizes, found = one.part.start.meta["val"].shape[:2], shape(_input(one, self.keep))
        if not self.keep or (found is not None and len(found) == 2 and all(map(same_size, found, sizes))):
            return True
        ctx.miss(f"its graph has no input {self.keep} of [{', '.join(map(str, sizes))}]", one.path)
        return False

    def _tells(self, one: Depth, ctx: Context) -> bool:
        """Does the block have what the router is fitted to, if it is fitted? A miss where not."""
        found = Named.parse("token importance", self.wanted)(one.region, one) if self._router().statistics else None
        if isinstance(found, str):
            ctx.miss(found, one.path)
        return not isinstance(found, str)

    def _routers(self, done: list[Depth], rows: Mapping[str, tuple[Tensor, Tensor]], share: float, ctx: Context) -> dict[str, _Stored]:
        """Path of a block -> its router, stored before the first block that it belongs to."""
        found: dict[str, _Stored] = {}
        for one in done:
            alike = [other for other in done if (other.region, other.width) == (one.region, one.width)] if self.common else [one]
            if one.path not in found:
                parts = [rows.get(other.path, unseen(other.width, 1)) for other in alike]
                x, wanted = torch.cat([own[0] for own in parts]), torch.cat([own[1] for own in parts])
                router = router_of(self._router(), one.width, x, wanted, share, ctx.seed)
                placed = one.placed(one.part.inside[0], self.name())
                nodes = {name: placed.stored("router", name, value) for name, value in router.tensors.items()}
                found |= dict.fromkeys((other.path for other in alike), (Formula({}, router.function), nodes))
        return found

    def _route(self, one: Depth, router: _Stored, share: float) -> None:
        part, by = one.part, self.name()
        placed = one.placed(part.inside[0], by)
        scores = placed.formula("router", router[0], {"x": part.start, **router[1]}, {})
        flat = placed.formula("router", Formula({}, _flat), {"scores": scores}, {})
        keep = _input(one, self.keep)
        ordered = flat if keep is None else placed.formula("router", Formula({}, _first), {"scores": flat, "keep": keep}, {})
        index = placed.formula("router", Formula({}, partial(top_tokens.op, share=share)), {"scores": ordered}, {})
        index.meta[TOKEN_SCORES] = flat.name
        readers = list(part.end.users)
        stream, end = part.run_on(index, by), part.end
        behind = one.placed(end.next, by)
        weight = Named.parse("expert weight", self.weight)(1)
        if weight is not None:
            every = behind.formula("router", Formula(weight.tensors, partial(_weighed, weight.function)), {"scores": scores}, {})
            taken = behind.formula("router", Formula({}, partial(take_part.op, dim=TOKENS)), {"x": every, "index": index}, {})
            end = behind.formula("", Formula({}, moved), {"x": stream, "y": end, "weight": taken}, {})
        new = behind.formula("", Formula({}, put_part.op), {"x": part.start, "y": end, "index": index}, {})
        for reader in readers:
            reader.replace_input_with(part.end, new)

    def _router(self) -> Named:
        return check_router(self.router, self.name())


def _input(one: Depth, name: str) -> fx.Node | None:
    return next((node for node in one.region.graph.nodes if node.op == "placeholder" and node.name == name), None)


def _first(scores: Tensor, keep: Tensor) -> Tensor:
    """Scores [B, T] of which those of the tokens to keep lie above all others; they stay in their order."""
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    return scores + (keep != 0) * (1 + high - low)


def _flat(scores: Tensor) -> Tensor:
    return scores[..., 0]


def _weighed(weight: Callable[..., Tensor], scores: Tensor) -> Tensor:
    return weight(scores, torch.zeros_like(scores, dtype=torch.int64))


class Block(nn.Module):
    """Attention and an FFN on the residual stream; for examples of passes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        found: Tensor = x + self.ffn(x)
        return found


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Four blocks over two texts of 20 tokens."""
    torch.manual_seed(0)
    return nn.Sequential(*[Block(16, 4) for _ in range(4)]).eval(), (torch.randn(2, 20, 16),)
