"""FFN channels that bypass the activation become one linear beside a thin FFN."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.functional import linear

from sparsify_compiler.fold import is_constant
from sparsify_compiler.normal_form_edit import argument, aten, is_call, only_user
from sparsify_compiler.passes.reparam._channels import Function, Reader, Run, Same, Unreadable
from sparsify_compiler.passes.reparam._norms import scale_and_shift
from sparsify_compiler.passes.reparam._token_norm import Entry, entry
from sparsify_compiler.passes_api import Context, Miss, Pass
from sparsify_compiler.pattern import Binding, Call, Pattern, op_name
from sparsify_compiler.program import Program, Region
from sparsify_compiler.rule import Match, Rule
from sparsify_compiler.splice import rewrite


@dataclass(frozen=True)
class MergeIdleChannels(Pass):
    """Merge the hidden channels of an FFN that bypass its activation into one linear of the FFN's input; the rest is a thinner FFN.

    Matches    linear(cat([act(h[..., :k]), h[..., k:]], -1), w2, b2), h = linear(x, w1, b1); any split, slice or fixed mask of h, any elementwise
               act. A BatchNorm before either linear and the shortcut `x +` around it all are taken too
    Rewrites   linear(act(linear(x, w1[:k], b1[:k])), w2[:, :k]) + linear(x, w2[:, k:] @ w1[k:] + I, w2[:, k:] @ b1[k:] + b2),
               with the norms' scales and shifts in w1, b1, w2, b2; I for the shortcut
    Preserves  values, up to float reassociation
    Paper      Xu et al., RePaViT: Scalable Vision Transformer Acceleration via Structural Reparameterization on Feedforward Network Layers,
               arXiv:2505.21847, section 3

    Left alone where the merged linear costs more than the idle channels did: with in_features * out_features above
    idle * (in_features + out_features). A gated FFN (SwiGLU) has no such channels: each is a product of two projections.
    """

    def run(self, program: Program, ctx: Context) -> Program:
        before = ctx.rewrites, len(ctx.misses)
        for region in program.regions.values():
            for node in list(region.graph.nodes):
                if ctx.fuel is not None and ctx.rewrites >= ctx.fuel:
                    break
                if not node._erased and is_call(node, aten.linear.default):
                    why = _merge(region, node, ctx, self.name())
                    if why is not None:
                        ctx.miss(why.why, region.qualified(why.at or node.name))
        if before == (ctx.rewrites, len(ctx.misses)):
            ctx.miss("there is no linear behind an elementwise function of another linear in the graph")
        return program


@dataclass(frozen=True)
class Part:
    """Hidden channels with one function: the rows of w1 and the columns of w2 that are theirs, as runs (start, stop)."""

    function: Function | Same
    rows: tuple[tuple[int, int], ...]
    columns: tuple[tuple[int, int], ...]


class MergeIdle(Rule):
    """The formula. mean1 to eps1 are of a norm before w1, mean2 to eps2 of one before w2; None where there is none."""

    only_if_cheaper = True

    @staticmethod
    def rewrite(x: Tensor, w1: Tensor, b1: Tensor | None, mean1: Tensor | None, var1: Tensor | None, g1: Tensor | None, beta1: Tensor | None,
                eps1: float, w2: Tensor, b2: Tensor | None, mean2: Tensor | None, var2: Tensor | None, g2: Tensor | None, beta2: Tensor | None,
                eps2: float, parts: Sequence[Part], shortcut: bool) -> Tensor:
        if mean1 is not None and var1 is not None:
            w1, b1 = _behind(w1, b1, *scale_and_shift(mean1, var1, g1, beta1, eps1))
        if mean2 is not None and var2 is not None:
            w2, b2 = _behind(w2, b2, *scale_and_shift(mean2, var2, g2, beta2, eps2))
        thin: list[Tensor] = []
        merged = torch.eye(w2.shape[0], dtype=w2.dtype, device=w2.device) if shortcut else None
        for part in parts:
            up, down = _take(w1, part.rows), _take(w2.t(), part.columns).t()
            bias = None if b1 is None else _take(b1, part.rows)
            if isinstance(part.function, Same):
                merged = down @ up if merged is None else merged + down @ up
                b2 = b2 if bias is None else down @ bias if b2 is None else b2 + down @ bias
            else:
                thin.append(linear(part.function(linear(x, up, bias)), down))
        assert merged is not None  # the match saw to it
        return sum([*thin[1:], linear(x, merged, b2)], thin[0])


def _behind(w: Tensor, b: Tensor | None, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear that takes s * x + t instead of x."""
    return w * s, w @ t if b is None else b + w @ t


def _take(tensor: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """These rows."""
    pieces = [tensor[start:stop] for start, stop in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@dataclass(frozen=True)
class _Ffn(Match):
    """What the formula replaces. Its linears stand where their like stood: into the hidden channels at the first, out of them at the second."""

    places: Iterator[fx.Node] = field(default_factory=lambda: iter(()))

    def source(self, op: str) -> fx.Node:
        return next(self.places, self.output) if op == "linear" else super().source(op)


def _merge(region: Region, down: fx.Node, ctx: Context, by: str) -> Miss | None:
    """Rewrite the FFN that ends at this linear. A Miss where it is one and stays; None where it is rewritten, or no FFN at all."""
    reader = Reader(region)
    inner = entry(down.kwargs["input"])
    try:
        runs = reader.read(inner.x)
    except Unreadable as reason:
        return Miss(str(reason)) if any(is_call(node, aten.linear.default) for node in reader.seen) else None
    parts = _parts(runs)
    if isinstance(parts, Miss):
        return parts
    up = runs[0].source
    outer = entry(up.kwargs["input"])
    add = _shortcut(down, outer.x)
    nodes = _dying({**reader.seen, down: None}, outer, inner, add)
    why = _unfit(nodes, add or down, up, down)
    if why is not None:
        return why
    bound = {"x": outer.x, "w1": up.kwargs["weight"], "b1": up.kwargs.get("bias"), "w2": down.kwargs["weight"], "b2": down.kwargs.get("bias"),
             **_bound(outer, "1"), **_bound(inner, "2"), "parts": parts, "shortcut": add is not None}
    calls = tuple(Call(op_name(node), (), {}) for node in nodes)
    thin = sum(not isinstance(part.function, Same) for part in parts)
    match = _Ffn(region, Pattern(tuple(bound), calls), Binding(bound, dict(zip(calls, nodes, strict=True))), iter([*[up, down] * thin, down]))
    return rewrite(MergeIdle(), match, ctx, by)


def _parts(runs: Sequence[Run]) -> tuple[Part, ...] | Miss:
    """The runs by function; a Miss unless some channels are idle and some are not."""
    if len({run.source for run in runs}) != 1:
        return Miss("its hidden channels come from several linears")
    found: list[Part] = []
    start = 0
    for run in runs:
        rows, columns = (run.start, run.stop), (start, start + len(run))
        same = next((i for i, part in enumerate(found) if part.function == run.function), None)
        if same is None:
            found.append(Part(run.function, (rows,), (columns,)))
        else:
            found[same] = Part(run.function, (*found[same].rows, rows), (*found[same].columns, columns))
        start += len(run)
    idle = [part for part in found if isinstance(part.function, Same)]
    if not idle:
        return Miss("every hidden channel goes through the activation: none is idle")
    return tuple(found) if len(found) > 1 else Miss("no hidden channel goes through an activation: these are two linears in a row")


def _shortcut(down: fx.Node, x: object) -> fx.Node | None:
    """The sum x + FFN(x), where the FFN's result goes nowhere else."""
    add = only_user(down)
    if not is_call(add, aten.add.Tensor) or argument(add, "alpha") != 1:
        return None
    return add if {add.kwargs["self"], add.kwargs["other"]} == {x, down} else None


def _dying(seen: dict[fx.Node, None], outer: Entry, inner: Entry, add: fx.Node | None) -> list[fx.Node]:
    """The nodes that are no longer needed, in graph order. The first norm may have other readers: then it stays."""
    taken = {*seen, *inner.nodes, *([add] if add is not None else [])}
    for node in reversed(outer.nodes):
        if not set(node.users) <= taken:
            break
        taken.add(node)
    first = next(iter(taken))
    return [node for node in first.graph.nodes if node in taken]


def _unfit(nodes: Sequence[fx.Node], output: fx.Node, up: fx.Node, down: fx.Node) -> Miss | None:
    inside = set(nodes)
    for node in nodes:
        outside = [user.name for user in node.users if user not in inside]
        if node is not output and outside:
            return Miss(f"the intermediate value {node.name} is also used by {', '.join(outside)}")
    for value in (up.kwargs["weight"], up.kwargs.get("bias"), down.kwargs["weight"], down.kwargs.get("bias")):
        if isinstance(value, fx.Node) and not is_constant(value):
            return Miss(f"{value.name} must be a parameter, it is computed from the input")
    return None


def _bound(entry: Entry, number: str) -> dict[str, Any]:
    names = ("mean", "var", "g", "beta", "eps")
    return {name + number: None if entry.norm is None else getattr(entry.norm, name) for name in names}


class _Block(nn.Module):
    """A RePa FFN with the norms that the paper gives it, and its shortcut."""

    def __init__(self, width: int, hidden: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.norm1, self.norm2 = nn.BatchNorm1d(width), nn.BatchNorm1d(hidden)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(self.norm1(x.transpose(1, 2)).transpose(1, 2))
        h = torch.cat([functional.gelu(h[..., : self.active]), h[..., self.active:]], -1)
        y: Tensor = self.fc2(self.norm2(h.transpose(1, 2)).transpose(1, 2))
        return x + y


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An FFN with three quarters of its hidden channels idle."""
    torch.manual_seed(0)
    return _Block(16, 64, 16).eval(), (torch.randn(2, 8, 16),)
