"""BatchNorm of an inference model, folded into the conv or linear beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d, linear

from sparsify_compiler.passes_api import Miss
from sparsify_compiler.rule import Match, Rule, RulePass


@dataclass(frozen=True)
class FoldBatchnorm(RulePass):
    """Fold an eval-mode BatchNorm into the conv, transposed conv or linear before it, or into the one after it.

    Matches    batch_norm(conv(x, w, b), mean, var, g, beta, eps)  or  conv(batch_norm(x, mean, var, g, beta, eps), w, b, padding=0)
    Rewrites   with s = g / sqrt(var + eps), t = beta - mean * s:
               conv(x, w * s, b * s + t)  or  conv(x, w * s, b + sum(w * t))
    Preserves  values, up to float reassociation
    Paper      Jacob et al., Quantization and Training of Neural Networks, arXiv:1712.05877, section 3.2
    """

    about: ClassVar[frozenset[str]] = frozenset({"batch_norm"})

    def rules(self) -> Sequence[Rule]:
        plain, transposed = (conv1d, conv2d, conv3d), (conv_transpose1d, conv_transpose2d, conv_transpose3d)
        after = [LinearThenNorm(), *map(ConvThenNorm, plain), *map(TransposedThenNorm, transposed)]
        return [*after, NormThenLinear(), *map(NormThenConv, plain)]


def scale_and_shift(mean: Tensor, var: Tensor, g: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The norm as s * x + t for each channel: s and t, both [C]."""
    s = torch.rsqrt(var + eps) if g is None else g * torch.rsqrt(var + eps)
    return s, -mean * s if beta is None else beta - mean * s


def along(vector: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """A vector shaped to multiply `tensor` along one of its dimensions."""
    return vector.reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])


class _Fold(Rule):
    params = ("w", "b", "mean", "var", "g", "beta")

    def check(self, m: Match) -> Miss | None:
        if m.mean is None or m.var is None:
            return Miss("the norm has no running statistics: it uses those of the batch")
        return None


class LinearThenNorm(_Fold):
    """batch_norm after linear, on [batch, features]."""

    @staticmethod
    def pattern(x: Any, w: Any, b: Any, mean: Any, var: Any, g: Any, beta: Any, eps: Any) -> Any:
        return batch_norm(linear(x, w, b), mean, var, g, beta, eps=eps)

    def check(self, m: Match) -> Miss | None:
        return super().check(m) or (None if m.output.meta["val"].ndim == 2 else Miss("the norm's channels are not the linear's features"))

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor | None, mean: Tensor, var: Tensor, g: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
        s, t = scale_and_shift(mean, var, g, beta, eps)
        return linear(x, w * s[:, None], t if b is None else b * s + t)


class ConvThenNorm(_Fold):
    """batch_norm after a conv of any number of dimensions and groups."""

    def __init__(self, conv: Callable[..., Any]) -> None:
        self.conv = conv

    def pattern(self, x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
                mean: Any, var: Any, g: Any, beta: Any, eps: Any) -> Any:
        return batch_norm(self.conv(x, w, b, stride, padding, dilation, groups), mean, var, g, beta, eps=eps)

    def rewrite(self, x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int,
                mean: Tensor, var: Tensor, g: Tensor | None, beta: Tensor | None, eps: float) -> Any:
        s, t = scale_and_shift(mean, var, g, beta, eps)
        return self.conv(x, w * along(s, w, 0), t if b is None else b * s + t, stride, padding, dilation, groups)


class TransposedThenNorm(_Fold):
    """batch_norm after a transposed conv, whose weight is [in, out / groups, ...]."""

    def __init__(self, conv: Callable[..., Any]) -> None:
        self.conv = conv

    def pattern(self, x: Any, w: Any, b: Any, stride: Any, padding: Any, output_padding: Any, groups: Any, dilation: Any,
                mean: Any, var: Any, g: Any, beta: Any, eps: Any) -> Any:
        return batch_norm(self.conv(x, w, b, stride, padding, output_padding, groups, dilation), mean, var, g, beta, eps=eps)

    def rewrite(self, x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any,
                mean: Tensor, var: Tensor, g: Tensor | None, beta: Tensor | None, eps: float) -> Any:
        s, t = scale_and_shift(mean, var, g, beta, eps)
        each = s.reshape(groups, 1, w.shape[1]).expand(groups, w.shape[0] // groups, w.shape[1]).reshape(w.shape[:2])
        scaled = w * each.reshape([*w.shape[:2], *[1] * (w.ndim - 2)])
        return self.conv(x, scaled, t if b is None else b * s + t, stride, padding, output_padding, groups, dilation)


class NormThenLinear(_Fold):
    """linear after batch_norm, on [batch, features]."""

    @staticmethod
    def pattern(x: Any, w: Any, b: Any, mean: Any, var: Any, g: Any, beta: Any, eps: Any) -> Any:
        return linear(batch_norm(x, mean, var, g, beta, eps=eps), w, b)

    def check(self, m: Match) -> Miss | None:
        return super().check(m) or (None if m.x.ndim == 2 else Miss("the norm's channels are not the linear's features"))

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor | None, mean: Tensor, var: Tensor, g: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
        s, t = scale_and_shift(mean, var, g, beta, eps)
        return linear(x, w * s, w @ t if b is None else b + w @ t)


class NormThenConv(_Fold):
    """conv after batch_norm. Where the conv pads, its zeros lie after the norm, and the shift would reach one pixel too far."""

    def __init__(self, conv: Callable[..., Any]) -> None:
        self.conv = conv

    def pattern(self, x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
                mean: Any, var: Any, g: Any, beta: Any, eps: Any) -> Any:
        return self.conv(batch_norm(x, mean, var, g, beta, eps=eps), w, b, stride, padding, dilation, groups)

    def check(self, m: Match) -> Miss | None:
        border = m.padding if isinstance(m.padding, tuple) else (0,) if m.padding == "valid" else (1,)
        return super().check(m) or (Miss(f"the conv pads by {m.padding} after the norm: its border would change") if any(border) else None)

    def rewrite(self, x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int,
                mean: Tensor, var: Tensor, g: Tensor | None, beta: Tensor | None, eps: float) -> Any:
        s, t = scale_and_shift(mean, var, g, beta, eps)
        out, taken = w.shape[0], w.shape[1]

        def each(v: Tensor) -> Tensor:  # [in] -> [out, in / groups, 1, ...]: what every output's own group of inputs has
            rows = v.reshape(groups, 1, taken).expand(groups, out // groups, taken)
            return rows.reshape([out, taken, *[1] * (w.ndim - 2)])

        shift = (w * each(t)).flatten(1).sum(1)
        return self.conv(x, w * each(s), shift if b is None else b + shift, stride, padding, dilation, groups)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A conv with a norm after it and one, with another conv behind, before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
    return model.eval(), (torch.randn(2, 3, 8, 8),)
