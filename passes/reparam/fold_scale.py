"""A constant factor beside a projection goes into its weight; one on queries or keys into the scale of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import conv1d, conv2d, conv3d, linear, scaled_dot_product_attention

from sparsify_compiler.fold import is_constant
from sparsify_compiler.normal_form_edit import is_call, only_user, replace
from sparsify_compiler.passes.reparam._weights import Change, aten, lengthened, not_along, number, tied, tied_in
from sparsify_compiler.passes_api import Context, Miss
from sparsify_compiler.program import Program, Region
from sparsify_compiler.rule import Match, Rule, RulePass

_LOOKS = (aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default,
          aten.slice.Tensor, aten.select.int, aten.flatten.using_ints,
          aten.t.default)


@dataclass(frozen=True)
class FoldScale(RulePass):
    """Fold a constant factor (a number, or a vector along the features such as LayerScale) into the linear or conv before or after it.

    A number on queries or keys goes into the scale of the attention, or back through reshapes and transposes into the projection.

    untie  scale a weight that others read too, by giving this place a copy of its own

    Matches    linear(x, w, b) * s, linear(x * s, w, b), the same for conv1d, conv2d, conv3d, and with division;
               scaled_dot_product_attention(q * s, k, v, scale=t), and with s on k; reshape or transpose of linear(x, w, b), times a number
    Rewrites   linear(x, s * w, s * b), linear(x, w * s, b), scaled_dot_product_attention(q, k, v, scale=t * s), reshape of linear(x, s * w, s * b)
    Preserves  values, up to float reassociation
    Paper      Touvron et al., Going deeper with Image Transformers (LayerScale), arXiv:2103.17239, section 2
    """

    about: ClassVar[frozenset[str]] = frozenset({"mul", "div"})
    untie: bool = False

    def rules(self) -> Sequence[Rule]:
        convs = [rule(conv, self.untie) for conv in (conv1d, conv2d, conv3d) for rule in (ScaledConv, ConvOfScaled)]
        return ScaledLinear(self.untie), LinearOfScaled(self.untie), *convs, ScaledQuery()

    def run(self, program: Program, ctx: Context) -> Program:
        program = super().run(program, ctx)
        for region in program.regions.values():
            for node in list(region.graph.nodes):
                if ctx.fuel is None or ctx.rewrites < ctx.fuel:
                    self._through_views(region, node, ctx)
        return program

    def _through_views(self, region: Region, node: fx.Node, ctx: Context) -> None:
        """A number that multiplies a view of a projection multiplies its weight."""
        if not is_call(node, aten.mul.Tensor, aten.div.Tensor) or not number(node.kwargs["other"]):
            return
        source, factor = node.kwargs["self"], node.kwargs["other"]
        while is_call(source, *_LOOKS) and only_user(source) is not None:
            source = source.kwargs["self"]
        if source is node.kwargs["self"] or not is_call(source, aten.linear.default) or only_user(source) is None:
            return
        if node.meta["val"].dtype != source.meta["val"].dtype or not is_constant(source.kwargs["weight"]):
            return
        miss = None if self.untie else tied(region, source.kwargs["weight"], [source])
        if miss is None:
            change = Change(region, self.name())
            times = torch.mul if is_call(node, aten.mul.Tensor) else torch.div
            for argument in ("weight", "bias"):
                if argument in source.kwargs:
                    change.set(source, argument, change.compute(source, lambda w: times(w, factor), source.kwargs[argument]))
            miss = change.store(ctx)
        if miss is None:
            replace(node, node.kwargs["self"])
        else:
            ctx.miss(miss.why, region.qualified(node.name))


class _Scale(Rule):
    """What all have in common: the factor is s, or 1 / d."""

    params = ("w", "b", "s", "d")

    def __init__(self, untie: bool = False) -> None:
        self.untie = untie

    def tied(self, m: Match) -> Miss | None:
        return None if self.untie else tied_in(m, "w")


def _factor(m: Match) -> Any:
    return m.s if "s" in m.binding.variables else m.d


def _times(tensor: Tensor, s: Any, d: Any, dim: int) -> Tensor:
    """The tensor times s, or divided by d, along one of its dimensions."""
    scaled: Tensor = tensor * lengthened(s, dim, tensor) if d is None else tensor / lengthened(d, dim, tensor)
    return scaled


class ScaledLinear(_Scale):
    """A factor after a linear."""

    def patterns(self) -> tuple[Callable[..., Any], ...]:
        return lambda x, w, b, s: linear(x, w, b) * s, lambda x, w, b, d: linear(x, w, b) / d

    def check(self, m: Match) -> Miss | None:
        return not_along(_factor(m), -1, m.w.shape[0], m.source("linear").meta["val"]) or self.tied(m)

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor | None, s: Any, d: Any) -> Tensor:
        return linear(x, _times(w, s, d, 0), None if b is None else _times(b, s, d, 0))


class LinearOfScaled(_Scale):
    """A factor before a linear."""

    def patterns(self) -> tuple[Callable[..., Any], ...]:
        return lambda x, w, b, s: linear(x * s, w, b), lambda x, w, b, d: linear(x / d, w, b)

    def check(self, m: Match) -> Miss | None:
        return _keeps(m) or not_along(_factor(m), -1, m.w.shape[1], m.x) or self.tied(m)

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor | None, s: Any, d: Any) -> Tensor:
        return linear(x, _times(w, s, d, 1), b)


class _ConvScale(_Scale):
    def __init__(self, conv: Callable[..., Any], untie: bool = False) -> None:
        super().__init__(untie)
        self.conv = conv


class ScaledConv(_ConvScale):
    """A factor after a conv, along its channels."""

    def patterns(self) -> tuple[Callable[..., Any], ...]:
        conv = self.conv
        return (lambda x, w, b, stride, padding, dilation, groups, s: conv(x, w, b, stride, padding, dilation, groups) * s,
                lambda x, w, b, stride, padding, dilation, groups, d: conv(x, w, b, stride, padding, dilation, groups) / d)

    def check(self, m: Match) -> Miss | None:
        return not_along(_factor(m), 1 - m.w.ndim, m.w.shape[0], m.source(self.conv.__name__).meta["val"]) or self.tied(m)

    def rewrite(self, x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, s: Any, d: Any) -> Any:
        return self.conv(x, _times(w, s, d, 0), None if b is None else _times(b, s, d, 0), stride, padding, dilation, groups)


class ConvOfScaled(_ConvScale):
    """A factor before a conv; the zeros that it pads with stay zeros."""

    def patterns(self) -> tuple[Callable[..., Any], ...]:
        conv = self.conv
        return (lambda x, w, b, stride, padding, dilation, groups, s: conv(x * s, w, b, stride, padding, dilation, groups),
                lambda x, w, b, stride, padding, dilation, groups, d: conv(x / d, w, b, stride, padding, dilation, groups))

    def check(self, m: Match) -> Miss | None:
        return _keeps(m) or not_along(_factor(m), 1 - m.w.ndim, m.w.shape[1] * m.groups, m.x) or self.tied(m)

    def rewrite(self, x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, s: Any, d: Any) -> Any:
        out, taken = w.shape[:2]
        grouped = w.reshape(groups, out // groups, taken, -1)

        def each(v: Any) -> Any:  # a vector [in] as [groups, 1, in / groups, 1]
            return v.reshape(groups, 1, taken, 1) if isinstance(v, Tensor) and v.numel() > 1 else v.reshape([]) if isinstance(v, Tensor) else v

        scaled = (grouped * each(s) if d is None else grouped / each(d)).reshape(w.shape)
        return self.conv(x, scaled, b, stride, padding, dilation, groups)


def _keeps(m: Match) -> Miss | None:
    """x is a tensor, of the shape and dtype of its product."""
    product = next(node for node in m.nodes if is_call(node, aten.mul.Tensor, aten.div.Tensor)).meta["val"]
    if not isinstance(m.x, Tensor) or m.node("x") is None or is_constant(m.node("x")):  # type: ignore[arg-type]
        return Miss("both factors are constants")
    same = m.x.ndim == product.ndim and m.x.dtype == product.dtype and m.x.shape[-1] == product.shape[-1]
    return None if same else Miss("the factor changes the shape or dtype")


class ScaledQuery(Rule):
    """A number on the queries or keys of an attention."""

    def patterns(self) -> tuple[Callable[..., Any], ...]:
        attend = scaled_dot_product_attention
        return (lambda q, k, v, mask, causal, t, gqa, s: attend(q * s, k, v, mask, 0.0, causal, scale=t, enable_gqa=gqa),
                lambda q, k, v, mask, causal, t, gqa, d: attend(q / d, k, v, mask, 0.0, causal, scale=t, enable_gqa=gqa),
                lambda q, k, v, mask, causal, t, gqa, s: attend(q, k * s, v, mask, 0.0, causal, scale=t, enable_gqa=gqa),
                lambda q, k, v, mask, causal, t, gqa, d: attend(q, k / d, v, mask, 0.0, causal, scale=t, enable_gqa=gqa))

    def check(self, m: Match) -> Miss | None:
        if not number(_factor(m)):
            return Miss("the factor of queries or keys is no number")
        scaled = next(node for node in m.nodes if is_call(node, aten.mul.Tensor, aten.div.Tensor))
        return None if scaled.meta["val"].dtype == scaled.kwargs["self"].meta["val"].dtype else Miss("the factor changes the dtype")

    @staticmethod
    def rewrite(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, t: float | None, gqa: bool, s: Any, d: Any) -> Tensor:
        scale = (1 / math.sqrt(q.shape[-1]) if t is None else t) * (s if d is None else 1 / d)
        return scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=gqa)


class _Block(nn.Module):
    """Queries scaled by hand, as BART and Whisper do, LayerScale behind the projection, and a scaled input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 3)
        self.gamma = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = ((p(x) * s).reshape(2, 5, 2, 4).transpose(1, 2) for p, s in ((self.q, 0.5), (self.k, 1.0), (self.v, 1.0)))
        mixed = scaled_dot_product_attention(q, k * 3.0, v).transpose(1, 2).reshape(2, 5, 8)
        y: Tensor = self.head(torch.tanh(self.gamma * self.out(mixed)) / 4.0)
        return y


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An attention whose queries and keys are scaled, and whose output is."""
    torch.manual_seed(0)
    return _Block().eval(), (torch.randn(2, 5, 8),)
