"""BatchNorm of an inference model, folded into the conv or linear beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d, linear

from sparsify_compiler.passes.reparam._frames import frame_of
from sparsify_compiler.passes.reparam._norms import along, batch_statistics, by_input, norm, plus, scale_and_shift, without_batch
from sparsify_compiler.passes_api import Miss
from sparsify_compiler.rule import Match, Rule, RulePass


@dataclass(frozen=True)
class FoldBatchnorm(RulePass):
    """Fold an eval-mode BatchNorm into the conv, transposed conv or linear before it, or into the one after it.

    A weight that another layer reads too is copied for this one; the other layer keeps what it had.

    Matches    batch_norm(conv(x, w, b), mean, var, g, beta, eps)  or  conv(batch_norm(x, mean, var, g, beta, eps), w, b, padding=0); conv of any
               dimensions and groups, transposed (behind the norm: stride 1, padding all of its kernel), or linear, also where a transpose,
               permute or flatten stands between the features and the norm's channels
    Rewrites   with s = g / sqrt(var + eps), t = beta - mean * s:
               conv(x, w * s, b * s + t)  or  conv(x, w * s, b + sum(w * t))
    Preserves  values, up to float reassociation
    Paper      Jacob et al., Quantization and Training of Neural Networks, arXiv:1712.05877, section 3.2
    """

    about: ClassVar[frozenset[str]] = frozenset({"batch_norm"})

    def rules(self) -> Sequence[Rule]:
        plain, transposed = (conv1d, conv2d, conv3d), (conv_transpose1d, conv_transpose2d, conv_transpose3d)
        after = [LinearThenNorm(), LinearViewNorm(), *map(ConvThenNorm, plain), *map(TransposedThenNorm, transposed)]
        return [*after, NormThenLinear(), NormViewLinear(), *map(NormThenConv, plain), *map(NormThenTransposed, transposed)]


class _Fold(Rule):
    params = ("w", "b", "mean", "var", "g", "beta")

    def check(self, m: Match) -> Miss | None:
        return batch_statistics(m.mean, m.var, m.training)


class LinearThenNorm(_Fold):
    """batch_norm after linear, on [batch, features]."""

    @staticmethod
    def pattern(x: Any, w: Any, b: Any, mean: Any, var: Any, g: Any, beta: Any, eps: Any, training: Any) -> Any:
        return norm(linear(x, w, b), mean, var, g, beta, eps, training)

    def check(self, m: Match) -> Miss | None:
        value = m.output.meta["val"]
        return super().check(m) or (None if value.ndim == 2 else Miss(f"{_NOT_FEATURES}: dimension 1 of {_shape(value)}, not the last"))

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor | None, mean: Tensor, var: Tensor, g: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
        s, t = scale_and_shift(mean, var, g, beta, eps)
        return linear(x, w * s[:, None], t if b is None else b * s + t)


class LinearViewNorm(_Fold):
    """batch_norm after linear, with a transpose, permute or flatten between that makes the features its channels."""

    def patterns(self) -> tuple[Callable[..., Any], ...]:
        return self.transposed, self.permuted, self.flattened

    @staticmethod
    def transposed(x: Any, w: Any, b: Any, i: Any, j: Any, mean: Any, var: Any, g: Any, beta: Any, eps: Any, training: Any) -> Any:
        return norm(linear(x, w, b).transpose(i, j), mean, var, g, beta, eps, training)

    @staticmethod
    def permuted(x: Any, w: Any, b: Any, dims: Any, mean: Any, var: Any, g: Any, beta: Any, eps: Any, training: Any) -> Any:
        return norm(torch.permute(linear(x, w, b), dims), mean, var, g, beta, eps, training)

    @staticmethod
    def flattened(x: Any, w: Any, b: Any, start: Any, end: Any, mean: Any, var: Any, g: Any, beta: Any, eps: Any, training: Any) -> Any:
        return norm(torch.flatten(linear(x, w, b), start, end), mean, var, g, beta, eps, training)

    def check(self, m: Match) -> Miss | None:
        found, rank = m.binding.variables, m.x.ndim
        if "start" in found:
            fits = m.start % rank == 0 and m.end % rank == rank - 2
        else:
            fits = m.dims[1] % rank == rank - 1 if "dims" in found else {m.i % rank, m.j % rank} == {1, rank - 1}
        return super().check(m) or (None if fits else Miss(f"{_NOT_FEATURES}: dimension 1 of {_shape(m.output.meta['val'])}"))

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor | None, i: Any, j: Any, dims: Any, start: Any, end: Any,
                mean: Tensor, var: Tensor, g: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
        return _viewed(LinearThenNorm.rewrite(x, w, b, mean, var, g, beta, eps), i, j, dims, start, end)


class ConvThenNorm(_Fold):
    """batch_norm after a conv of any number of dimensions and groups."""

    def __init__(self, conv: Callable[..., Any]) -> None:
        self.conv = conv

    def pattern(self, x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
                mean: Any, var: Any, g: Any, beta: Any, eps: Any, training: Any) -> Any:
        return norm(self.conv(x, w, b, stride, padding, dilation, groups), mean, var, g, beta, eps, training)

    def check(self, m: Match) -> Miss | None:
        return super().check(m) or without_batch(m)

    def rewrite(self, x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int,
                mean: Tensor, var: Tensor, g: Tensor | None, beta: Tensor | None, eps: float) -> Any:
        s, t = scale_and_shift(mean, var, g, beta, eps)
        return self.conv(x, w * along(s, w, 0), t if b is None else b * s + t, stride, padding, dilation, groups)


class TransposedThenNorm(_Fold):
    """batch_norm after a transposed conv, whose weight is [in, out / groups, ...]."""

    def __init__(self, conv: Callable[..., Any]) -> None:
        self.conv = conv

    def pattern(self, x: Any, w: Any, b: Any, stride: Any, padding: Any, output_padding: Any, groups: Any, dilation: Any,
                mean: Any, var: Any, g: Any, beta: Any, eps: Any, training: Any) -> Any:
        return norm(self.conv(x, w, b, stride, padding, output_padding, groups, dilation), mean, var, g, beta, eps, training)

    def check(self, m: Match) -> Miss | None:
        return super().check(m) or without_batch(m)

    def rewrite(self, x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any,
                mean: Tensor, var: Tensor, g: Tensor | None, beta: Tensor | None, eps: float) -> Any:
        s, t = scale_and_shift(mean, var, g, beta, eps)
        each = s.reshape(groups, 1, w.shape[1]).expand(groups, w.shape[0] // groups, w.shape[1]).reshape(w.shape[:2])
        scaled = w * each.reshape([*w.shape[:2], *[1] * (w.ndim - 2)])
        return self.conv(x, scaled, t if b is None else b * s + t, stride, padding, output_padding, groups, dilation)


class NormThenLinear(_Fold):
    """linear after batch_norm, on [batch, features]."""

    @staticmethod
    def pattern(x: Any, w: Any, b: Any, mean: Any, var: Any, g: Any, beta: Any, eps: Any, training: Any) -> Any:
        return linear(norm(x, mean, var, g, beta, eps, training), w, b)

    def check(self, m: Match) -> Miss | None:
        return super().check(m) or (None if m.x.ndim == 2 else Miss(f"{_NOT_FEATURES}: dimension 1 of {_shape(m.x)}, not the last"))

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor | None, mean: Tensor, var: Tensor, g: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
        s, t = scale_and_shift(mean, var, g, beta, eps)
        return linear(x, w * s, plus(w @ t, b))


class NormViewLinear(_Fold):
    """linear after batch_norm, with a transpose, permute or flatten between that makes the norm's channels its features."""

    def patterns(self) -> tuple[Callable[..., Any], ...]:
        return self.transposed, self.permuted, self.flattened

    @staticmethod
    def transposed(x: Any, w: Any, b: Any, i: Any, j: Any, mean: Any, var: Any, g: Any, beta: Any, eps: Any, training: Any) -> Any:
        return linear(norm(x, mean, var, g, beta, eps, training).transpose(i, j), w, b)

    @staticmethod
    def permuted(x: Any, w: Any, b: Any, dims: Any, mean: Any, var: Any, g: Any, beta: Any, eps: Any, training: Any) -> Any:
        return linear(torch.permute(norm(x, mean, var, g, beta, eps, training), dims), w, b)

    @staticmethod
    def flattened(x: Any, w: Any, b: Any, start: Any, end: Any, mean: Any, var: Any, g: Any, beta: Any, eps: Any, training: Any) -> Any:
        return linear(torch.flatten(norm(x, mean, var, g, beta, eps, training), start, end), w, b)

    def check(self, m: Match) -> Miss | None:
        found, rank = m.binding.variables, m.x.ndim
        if "start" in found:
            fits = m.start % rank == 1 and m.end % rank == rank - 1
        else:
            fits = m.dims[-1] % rank == 1 if "dims" in found else {m.i % rank, m.j % rank} == {1, rank - 1}
        return super().check(m) or (None if fits else Miss(f"{_NOT_FEATURES}: dimension 1 of {_shape(m.x)}"))

    @staticmethod
    def rewrite(x: Tensor, w: Tensor, b: Tensor | None, i: Any, j: Any, dims: Any, start: Any, end: Any,
                mean: Tensor, var: Tensor, g: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
        s, t = (v[:, None].expand(-1, w.shape[1] // v.shape[0]).reshape(-1) for v in scale_and_shift(mean, var, g, beta, eps))
        return linear(_viewed(x, i, j, dims, start, end), w * s, plus(w @ t, b))


class NormThenConv(_Fold):
    """conv after batch_norm. Where the conv pads, its zeros lie after the norm, and the shift would reach one pixel too far."""

    def __init__(self, conv: Callable[..., Any]) -> None:
        self.conv = conv

    def pattern(self, x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
                mean: Any, var: Any, g: Any, beta: Any, eps: Any, training: Any) -> Any:
        return self.conv(norm(x, mean, var, g, beta, eps, training), w, b, stride, padding, dilation, groups)

    def check(self, m: Match) -> Miss | None:
        pads = any(p > 0 for line in frame_of(m.w.shape[2:], m.stride, m.padding, m.dilation) for p in line.pads)
        border = Miss(f"the conv pads by {m.padding} after the norm: its border would change") if pads else None
        return super().check(m) or without_batch(m) or border

    def rewrite(self, x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int,
                mean: Tensor, var: Tensor, g: Tensor | None, beta: Tensor | None, eps: float) -> Any:
        s, t = scale_and_shift(mean, var, g, beta, eps)
        shift = (w * by_input(t, w, groups)).flatten(1).sum(1)
        return self.conv(x, w * by_input(s, w, groups), plus(shift, b), stride, padding, dilation, groups)


class NormThenTransposed(_Fold):
    """Transposed conv after batch_norm. Each output must see every tap, or the shift would not be one bias: stride 1, and the border cut off."""

    def __init__(self, conv: Callable[..., Any]) -> None:
        self.conv = conv

    def pattern(self, x: Any, w: Any, b: Any, stride: Any, padding: Any, output_padding: Any, groups: Any, dilation: Any,
                mean: Any, var: Any, g: Any, beta: Any, eps: Any, training: Any) -> Any:
        return self.conv(norm(x, mean, var, g, beta, eps, training), w, b, stride, padding, output_padding, groups, dilation)

    def check(self, m: Match) -> Miss | None:
        size = tuple(m.w.shape[2:])
        whole = all(s == 1 and p >= d * (k - 1) + o
                    for k, s, p, o, d in zip(size, m.stride, m.padding, m.output_padding, m.dilation, strict=True))
        found = f"the transposed conv ({'x'.join(map(str, size))}, stride {m.stride}, padding {m.padding})"
        some = None if whole else Miss(f"some outputs of {found} see fewer taps than others: the norm's shift is not one bias")
        return super().check(m) or without_batch(m) or some

    def rewrite(self, x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any,
                mean: Tensor, var: Tensor, g: Tensor | None, beta: Tensor | None, eps: float) -> Any:
        s, t = scale_and_shift(mean, var, g, beta, eps)
        shift = (w * along(t, w, 0)).flatten(2).sum(2).reshape(groups, -1, w.shape[1]).sum(1).reshape(-1)
        return self.conv(x, w * along(s, w, 0), plus(shift, b), stride, padding, output_padding, groups, dilation)


_NOT_FEATURES = "the norm's channels are not the linear's features"


def _viewed(x: Tensor, i: Any, j: Any, dims: Any, start: Any, end: Any) -> Tensor:
    """The view that stood beside the norm; what the others take is None."""
    if i is not None:
        return x.transpose(i, j)
    return torch.flatten(x, start, end) if dims is None else x.permute(dims)


def _shape(value: Any) -> str:
    return f"[{', '.join(map(str, value.shape))}]"


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A conv with a norm after it and one, with another conv behind, before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
    return model.eval(), (torch.randn(2, 3, 8, 8),)
