"""Adapters of a linear or conv that are linear themselves become part of its weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, embedding, linear

from sparsify_compiler.passes.reparam._unmask import unmask_changes
from sparsify_compiler.passes.reparam._weights import fold_combined, lengthened, not_along, tied_in
from sparsify_compiler.passes.reparam.merge_linear_chain import after
from sparsify_compiler.passes_api import Context, Miss
from sparsify_compiler.program import Program
from sparsify_compiler.rule import Match, Rule, RulePass

Function = Callable[..., Any]


@dataclass(frozen=True)
class MergeAdapters(RulePass):
    """Merge low-rank and other linear adapters into the layer that they adapt: LoRA, DoRA, VeRA, SPP, SQFT's SparsePEFT, serial linear adapters.

    A mask of the layer's weight is kept. An adapter that is not masked itself would fill its zeros: then nothing is merged, and the reason told.

    Matches    linear(x, w, b) + s * linear(linear(x, p, c), u, d), the scales at any place, alone or in a longer sum; the same with
               h = linear(x, w, b) itself as the adapter's input, with one linear as adapter, with conv2d and 1x1 conv2d, with embedding;
               g * (h + s * linear(linear(x, p), u)), which is DoRA with g = m / norm(w + s u p), and peft's spelling of it,
               h + ((g - 1) * (h - b) + g * linear(linear(x, p), u) * s);
               and weights that are computed from several parameters. The mask of an adapter that is one linear is no promise beside a dense layer
    Rewrites   linear(x, w + s u p, b + s (u c + d)); for DoRA linear(x, g * (w + s u p), b)
    Preserves  values, up to float reassociation
    Paper      LoRA, arXiv:2106.09685, section 4.1; DoRA, arXiv:2402.09353, section 4.1; VeRA, arXiv:2310.11454; SPP, arXiv:2405.16057;
               SQFT, arXiv:2410.03750

    fill  one dense weight of a masked layer and a low-rank one beside it too (SLTrain's, arXiv:2406.02214): the mask's zeros go
    """

    fill: bool = False

    about: ClassVar[frozenset[str]] = frozenset({"add"})

    def rules(self) -> Sequence[Rule]:
        return LowRank(), Serial(), Parallel(), Magnitude(), ConvLowRank(), ConvMagnitude(), EmbeddingLowRank()

    def run(self, program: Program, ctx: Context) -> Program:
        for region in program.regions.values():
            unmask_changes(region, ctx, self.name(), self.fill)
        program = super().run(program, ctx)
        for region in program.regions.values():
            fold_combined(region, ctx, self.name())
        return program


def _low_rank() -> tuple[Function, ...]:
    """Every way to scale linear(linear(x, p, c), u, d): not, outside (s), between (r), before (i), between and outside as VeRA does."""
    return (lambda x, p, c, u, d: linear(linear(x, p, c), u, d),
            lambda x, p, c, u, d, s: linear(linear(x, p, c), u, d) * s,
            lambda x, p, c, u, d, r: linear(linear(x, p, c) * r, u, d),
            lambda x, p, c, u, d, i: linear(linear(x * i, p, c), u, d),
            lambda x, p, c, u, d, s, r: linear(linear(x, p, c) * r, u, d) * s)


def _delta(p: Tensor, c: Tensor | None, u: Tensor, d: Tensor | None, s: Any, r: Any, i: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the adapter as one linear."""
    inner = p if i is None else p * lengthened(i, 1, p)
    if r is not None:
        inner, c = inner * lengthened(r, 0, inner), None if c is None else c * lengthened(r, 0, c)
    weight, bias = u @ inner, after(c, u, d)
    if s is None:
        return weight, bias
    return weight * lengthened(s, 0, weight), None if bias is None else bias * lengthened(s, 0, bias)


def _sum(b: Tensor | None, c: Tensor | None) -> Tensor | None:
    return b if c is None else c if b is None else b + c


def _with_scales(adapter: Function, base: Function, join: str) -> Function:
    """base + adapter, base + (adapter + y) or (base + y) + adapter as one pattern, whose arguments are the adapter's, the base's and y."""
    import inspect

    taken = list(inspect.signature(adapter).parameters)
    names = [*taken, "w", "b", *([] if join == "alone" else ["y"])]

    def pattern(*values: Any) -> Any:
        by_name = dict(zip(names, values, strict=True))
        h = base(by_name["x"], by_name["w"], by_name["b"])
        low = adapter(**{name: by_name[name] for name in taken})
        if join == "alone":
            return h + low
        return h + (low + by_name["y"]) if join == "adapters first" else (h + by_name["y"]) + low

    pattern.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names])
    return pattern


class _Adapter(Rule):
    params: ClassVar[tuple[str, ...]] = ("w", "b", "p", "c", "u", "d", "s", "r", "i", "v", "e", "g", "k")
    joins: ClassVar[tuple[str, ...]] = ("alone", "adapters first", "others first")

    def check(self, m: Match) -> Miss | None:
        known = m.binding.variables
        for name, dim, features in (("s", -1, "u"), ("r", -1, "p"), ("i", -1, "p")):
            if name in known:
                miss = not_along(getattr(m, name), dim, getattr(m, features).shape[1 if name == "i" else 0], m.output.meta["val"])
                if miss is not None:
                    return miss
        return _one_dtype(m) or tied_in(m, "w")


def _one_dtype(m: Match) -> Miss | None:
    kinds = {str(getattr(m, name).dtype) for name in ("w", "p", "u", "v") if name in m.binding.variables}
    return None if len(kinds) == 1 else Miss(f"layer and adapter have different dtypes: {', '.join(sorted(kinds))}")


class LowRank(_Adapter):
    """LoRA beside a linear, one of several, or before others are added."""

    def patterns(self) -> tuple[Function, ...]:
        return tuple(_with_scales(adapter, linear, join) for adapter in _low_rank() for join in self.joins)

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor | None, p: Tensor, c: Tensor | None, u: Tensor, d: Tensor | None,
                s: Any, r: Any, i: Any, y: Any) -> Tensor:
        weight, bias = _delta(p, c, u, d, s, r, i)
        merged = linear(x, w + weight, _sum(b, bias))
        return merged if y is None else merged + y


class Serial(_Adapter):
    """A bottleneck without nonlinearity behind a linear, around which its output goes."""

    def patterns(self) -> tuple[Function, ...]:
        def plain(x: Any, w: Any, b: Any, p: Any, c: Any, u: Any, d: Any) -> Any:
            h = linear(x, w, b)
            return h + linear(linear(h, p, c), u, d)

        def scaled(x: Any, w: Any, b: Any, p: Any, c: Any, u: Any, d: Any, s: Any) -> Any:
            h = linear(x, w, b)
            return h + linear(linear(h, p, c), u, d) * s

        return plain, scaled

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor | None, p: Tensor, c: Tensor | None, u: Tensor, d: Tensor | None, s: Any) -> Tensor:
        weight, bias = _delta(p, c, u, d, s, None, None)
        moved = None if b is None else b + weight @ b
        return linear(x, w + weight @ w, _sum(moved, bias))


class Parallel(_Adapter):
    """An adapter of one linear: SQFT's linear(x, (u p) * mask), DSEE's sparse residual."""

    def patterns(self) -> tuple[Function, ...]:
        adapters: tuple[Function, ...] = (lambda x, v, e: linear(x, v, e), lambda x, v, e, s: linear(x, v, e) * s)
        return tuple(_with_scales(adapter, linear, join) for adapter in adapters for join in self.joins)

    def check(self, m: Match) -> Miss | None:
        if "s" in m.binding.variables:
            miss = not_along(m.s, -1, m.v.shape[0], m.output.meta["val"])
            if miss is not None:
                return miss
        return _one_dtype(m) or tied_in(m, "w", "v")

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor | None, v: Tensor, e: Tensor | None, s: Any, y: Any) -> Tensor:
        weight, bias = (v, e) if s is None else (v * lengthened(s, 0, v), None if e is None else e * lengthened(s, 0, e))
        merged = linear(x, w + weight, _sum(b, bias))
        return merged if y is None else merged + y


class Magnitude(_Adapter):
    """DoRA: g scales base and adapter; as peft computes it, k = g - 1 scales the base without its bias, and is added to the base."""

    def patterns(self) -> tuple[Function, ...]:
        def with_bias(x: Any, w: Any, b: Any, p: Any, u: Any, g: Any, k: Any, s: Any) -> Any:
            h = linear(x, w, b)
            return h + (k * (h - b) + g * linear(linear(x, p), u) * s)

        def without(x: Any, w: Any, p: Any, u: Any, g: Any, k: Any, s: Any) -> Any:
            h = linear(x, w)
            return h + (k * h + g * linear(linear(x, p), u) * s)

        def without_scale(x: Any, w: Any, b: Any, p: Any, u: Any, g: Any, k: Any) -> Any:
            h = linear(x, w, b)
            return h + (k * (h - b) + g * linear(linear(x, p), u))

        def by_hand(x: Any, w: Any, b: Any, p: Any, u: Any, g: Any, s: Any) -> Any:
            return g * (linear(x, w, b) + linear(linear(x, p), u) * s)

        def by_hand_without_scale(x: Any, w: Any, b: Any, p: Any, u: Any, g: Any) -> Any:
            return g * (linear(x, w, b) + linear(linear(x, p), u))

        return with_bias, without, without_scale, by_hand, by_hand_without_scale

    def check(self, m: Match) -> Miss | None:
        like, features = m.output.meta["val"], m.w.shape[0]
        scales = [getattr(m, name) for name in ("g", "k", "s") if name in m.binding.variables]
        bad = next((miss for miss in (not_along(scale, -1, features, like) for scale in scales) if miss is not None), None)
        return bad or _one_dtype(m) or tied_in(m, "w")

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor | None, p: Tensor, u: Tensor, g: Any, k: Any, s: Any) -> Tensor:
        delta = u @ p if s is None else (u @ p) * lengthened(s, 0, w)
        if k is None:
            return linear(x, lengthened(g, 0, w) * (w + delta), None if b is None else b * lengthened(g, 0, b))
        return linear(x, w + lengthened(k, 0, w) * w + lengthened(g, 0, w) * delta, b)


class ConvLowRank(_Adapter):
    """LoRA beside a conv2d: one of its own kernel size, then a 1x1."""

    @staticmethod
    def pattern(x: Any, w: Any, b: Any, p: Any, u: Any, stride: Any, padding: Any, dilation: Any, s: Any) -> Any:
        return conv2d(x, w, b, stride, padding, dilation) + conv2d(conv2d(x, p, None, stride, padding, dilation), u) * s

    def check(self, m: Match) -> Miss | None:
        return _small(m) or not_along(m.s, -3, m.w.shape[0], m.output.meta["val"]) or _one_dtype(m) or tied_in(m, "w")

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor | None, p: Tensor, u: Tensor, stride: Any, padding: Any, dilation: Any, s: Any) -> Tensor:
        return conv2d(x, w + lengthened(s, 0, w) * _product(u, p), b, stride, padding, dilation)


class ConvMagnitude(_Adapter):
    """DoRA beside a conv2d; q is the bias b in the shape of the output."""

    params = ("w", "b", "p", "u", "g", "k", "q")

    @staticmethod
    def pattern(x: Any, w: Any, b: Any, p: Any, u: Any, g: Any, k: Any, q: Any, stride: Any, padding: Any, dilation: Any, s: Any) -> Any:
        h = conv2d(x, w, b, stride, padding, dilation)
        return h + (k * (h - q) + g * conv2d(conv2d(x, p, None, stride, padding, dilation), u) * s)

    def check(self, m: Match) -> Miss | None:
        like, features = m.output.meta["val"], m.w.shape[0]
        scales = not_along(m.g, -3, features, like) or not_along(m.k, -3, features, like) or not_along(m.q, -3, features, like)
        return _small(m) or scales or _one_dtype(m) or tied_in(m, "w")

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor | None, p: Tensor, u: Tensor, g: Any, k: Any, q: Any,
                stride: Any, padding: Any, dilation: Any, s: Any) -> Tensor:
        merged = w + lengthened(k, 0, w) * w + lengthened(g, 0, w) * _product(u, p) * s
        bias = -(k * q).reshape(-1) if b is None else b + lengthened(k, 0, b) * (b - q.reshape(-1))
        return conv2d(x, merged, bias, stride, padding, dilation)


def _small(m: Match) -> Miss | None:
    if tuple(m.u.shape[2:]) != (1, 1):
        return Miss(f"the adapter's second conv is {'x'.join(map(str, m.u.shape[2:]))}, not 1x1")
    return None if m.p.shape[1:] == m.w.shape[1:] else Miss("the adapter's first conv has another kernel than the layer")


def _product(u: Tensor, p: Tensor) -> Tensor:
    """A conv p and a 1x1 conv u behind it as one kernel."""
    return (u.flatten(1) @ p.flatten(1)).reshape(u.shape[0], *p.shape[1:])


class EmbeddingLowRank(_Adapter):
    """LoRA of an embedding."""

    @staticmethod
    def pattern(x: Any, w: Any, p: Any, u: Any, s: Any) -> Any:
        return embedding(x, w) + linear(embedding(x, p), u) * s

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, p: Tensor, u: Tensor, s: Any) -> Tensor:
        delta = p @ u.t()
        return embedding(x, w + delta * lengthened(s, 1, delta))


class _Adapted(nn.Module):
    """A linear with a LoRA, and one with a DoRA, as peft computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.out = nn.Linear(8, 6), nn.Linear(6, 4)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.p, self.u, self.m = (nn.Parameter(torch.randn(*shape)) for shape in ((2, 6), (4, 2), (4,)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.base(x) + self.up(self.down(x)) * 2.0)
        h = self.out(x)
        g = (self.m / torch.linalg.norm(self.out.weight + 0.5 * (self.u @ self.p), dim=1)).view(1, -1)
        y: Tensor = h + ((g - 1) * (h - self.out.bias) + g * linear(linear(x, self.p), self.u) * 0.5)
        return y


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two linears, each with an adapter."""
    torch.manual_seed(0)
    return _Adapted().eval(), (torch.randn(3, 8),)
