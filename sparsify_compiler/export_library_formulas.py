"""Operators that TVM's importer of exported programs takes for something else, spelled as formulas of others that it knows.

Of each, what it made of it: batch_norm of an inference model as one in training, instance_norm without its weights, an `alpha` of
add, sub and celu as 1, a quotient of whole numbers as a whole number, an index below 0 as one outside of the table, indices with whole
axes between them in another order, a nearest pixel as another one, the scale of a picture as that of its rounded size, narrow()'s
length as its end; a divisor of pools it did not read; what is no number, or infinite, in argsort, logical_xor, softshrink and floor division.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def _batch_norm(input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, running_mean: Tensor | None = None,
               running_var: Tensor | None = None, *, eps: float, training: bool = False, **_: Any) -> Any:
    dtype, shape = torch.promote_types(input.dtype, torch.float32), (1, -1, *(1,) * (input.dim() - 2))
    x = input.to(dtype)
    if training or running_mean is None or running_var is None:
        axes = [axis for axis in range(input.dim()) if axis != 1]
        running_mean = x.mean(axes)
        running_var = (x - running_mean.view(shape)).square().mean(axes)
    scale = torch.rsqrt(running_var.to(dtype) + eps)
    scale = scale if weight is None else scale * weight.to(dtype)
    shift = -running_mean.to(dtype) * scale
    shift = shift if bias is None else shift + bias.to(dtype)
    return (x * scale.view(shape) + shift.view(shape)).to(input.dtype)


def _instance_norm(input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, running_mean: Tensor | None = None,
                  running_var: Tensor | None = None, *, use_input_stats: bool, eps: float, **_: Any) -> Any:
    if not use_input_stats:
        return _batch_norm(input, weight, bias, running_mean, running_var, eps=eps)
    dtype, shape = torch.promote_types(input.dtype, torch.float32), (1, -1, *(1,) * (input.dim() - 2))
    axes = list(range(2, input.dim()))
    x = input.to(dtype) - input.to(dtype).mean(axes, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)
    x = x if weight is None else x * weight.to(dtype).view(shape)
    return (x if bias is None else x + bias.to(dtype).view(shape)).to(input.dtype)


def _celu(self: Tensor, *, alpha: float = 1.0) -> Any:
    return torch.where(self > 0, self, alpha * (torch.exp(self.clamp(max=0) / alpha) - 1))


def _add(self: Tensor, other: Any, *, alpha: float) -> Any:
    return self + other * alpha


def _sub(self: Tensor, other: Any, *, alpha: float = 1) -> Any:
    return self - other * alpha


def _rsub(self: Tensor, other: Any, *, alpha: float = 1) -> Any:
    return -(self * alpha) + other


def _div(self: Tensor, other: Any) -> Any:
    wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return self.to(wide) / (other.to(wide) if isinstance(other, Tensor) else other)


def _nearest(input: Tensor, *, output_size: Sequence[int] | None = None, scale_factors: Sequence[float] | None = None) -> Any:
    """Rows of pixels, then columns: which ones, torch says itself of a line of numbers, each axis alone."""
    for axis in range(input.dim() - 2):
        line = torch.arange(input.shape[2 + axis], dtype=torch.float64).view(1, 1, -1)
        sizes = None if output_size is None else [output_size[axis]]
        scales = None if scale_factors is None else [scale_factors[axis]]
        places = aten.upsample_nearest1d.vec(line, sizes, scales).view(-1).to(torch.int64)
        input = input.index_select(2 + axis, places)
    return input


def _resized(input: Tensor, *, op: Any, align_corners: bool, output_size: Sequence[int] | None = None,
            scale_factors: Sequence[float] | None = None) -> Any:
    """A separable interpolation as a product for each axis: its weights are what it makes of pictures of one pixel."""
    for axis in (0, 1):
        pixels = input.shape[2 + axis]
        sizes = None if output_size is None else [output_size[axis], 1]
        scales = None if scale_factors is None else [scale_factors[axis], 1.0]
        weights = op(torch.eye(pixels, dtype=torch.float32).view(1, pixels, pixels, 1), sizes, align_corners, scales).view(pixels, -1).to(input.dtype)
        input = input @ weights if axis else weights.t() @ input
    return input


def _avg_pool2d(self: Tensor, *, kernel_size: Sequence[int], divisor_override: int, **given: Any) -> Any:
    size = kernel_size[0] * kernel_size[-1]
    return aten.avg_pool2d.default(self, kernel_size, **{**given, "count_include_pad": True}) * (size / divisor_override)


def _narrow(self: Tensor, *, dim: int, start: int, length: int) -> Any:
    return aten.slice.Tensor(self, dim, start, start + length)


def _pixel_shuffle(self: Tensor, *, upscale_factor: int) -> Any:
    *lead, channels, height, width = self.shape
    r, n = upscale_factor, len(lead)
    parts = self.view(*lead, channels // (r * r), r, r, height, width)
    return parts.permute(*range(n), n, n + 3, n + 1, n + 4, n + 2).reshape(*lead, channels // (r * r), height * r, width * r)


def _index(self: Tensor, **given: Any) -> Tensor:
    """Indices in the first axes, none of them below 0. given: "i0", "i1"... for axes 0, 1..., without those that are taken whole."""
    chosen = [axis for axis in range(self.dim()) if f"i{axis}" in given]
    rest = [axis for axis in range(self.dim()) if axis not in chosen]
    places = [torch.where(given[f"i{axis}"] < 0, given[f"i{axis}"] + self.shape[axis], given[f"i{axis}"]) for axis in chosen]
    found: Tensor = aten.index.Tensor(self.permute(*chosen, *rest), places)
    together = chosen == list(range(chosen[0], chosen[-1] + 1))
    made, front = found.dim() - len(rest), chosen[0] if together else 0
    return found.permute(*range(made, made + front), *range(made), *range(made + front, found.dim()))


def _argsort(self: Tensor, *, dim: int = -1, descending: bool = False, **_: Any) -> Tensor:
    return torch.sort(self, dim, descending).indices


def _xor(self: Tensor, other: Tensor) -> Tensor:
    first, second = (one if one.dtype is torch.bool else one != 0 for one in (self, other))
    return (first | second) & ~(first & second)


def _softshrink(self: Tensor, *, lambd: float = 0.5) -> Tensor:
    return torch.where(self > lambd, self - lambd, torch.where(self < -lambd, self + lambd, torch.where(self.isnan(), self, 0.0)))


def _floor_div(self: Tensor, other: Any, **_: Any) -> Tensor:
    rest = torch.fmod(self, other)
    whole = (self - rest) / other
    whole = torch.where(rest * other < 0, whole - 1, whole)
    floor = torch.floor(whole)
    return torch.where(whole - floor > 0.5, floor + 1, floor)


def _is_scaled(node: Any) -> bool:
    return bool(node.kwargs.get("alpha", 1) != 1)


def _is_whole(node: Any) -> bool:
    return not any(one.meta["val"].is_floating_point() for one in node.all_input_nodes if isinstance(one.meta.get("val"), Tensor))


def _is_uneven(node: Any) -> bool:
    """Is a nearest pixel another one than that of a picture that grows by whole numbers?"""
    source, made = node.all_input_nodes[0].meta["val"].shape[2:], node.meta["val"].shape[2:]
    fixed = all(isinstance(size, int) for size in (*source, *made))
    return len(made) != 2 or not fixed or any(new % old for old, new in zip(source, made, strict=True))


def _is_rounded(node: Any) -> bool:
    """Has a picture no size that is its scale times the one before?"""
    scales = node.kwargs.get("scale_factors")
    return scales is not None and any(old * scale != new for old, scale, new in zip(
        node.all_input_nodes[0].meta["val"].shape[2:], scales, node.meta["val"].shape[2:], strict=True))


def _is_floored(node: Any) -> bool:
    return node.kwargs.get("rounding_mode", "floor") == "floor" and bool(node.meta["val"].is_floating_point())


def _has_divisor(node: Any) -> bool:
    return node.kwargs.get("divisor_override") is not None


def _is_fixed(node: Any) -> bool:
    return isinstance(node.kwargs["start"], int) and node.kwargs["start"] >= 0


def _is_placed(node: Any) -> bool:
    return all(one is None or (isinstance(one, fx.Node) and one.meta["val"].dtype in (torch.int64, torch.int32)) for one in node.kwargs["indices"])


def _always(node: Any) -> bool:
    return True


# operator -> when it is spelled, and as what
SPELLINGS: Mapping[Any, tuple[Callable[[Any], bool], Callable[..., Any]]] = {
    aten.batch_norm.default: (_always, _batch_norm),
    aten.instance_norm.default: (_always, _instance_norm),
    aten.celu.default: (_always, _celu),
    aten.add.Tensor: (_is_scaled, _add),
    aten.sub.Tensor: (_is_scaled, _sub),
    aten.rsub.Scalar: (_always, _rsub),
    aten.div.Tensor: (_is_whole, _div),
    **dict.fromkeys((aten.div.Tensor_mode, aten.floor_divide.default), (_is_floored, _floor_div)),
    **dict.fromkeys((aten.argsort.default, aten.argsort.stable), (_always, _argsort)),
    aten.logical_xor.default: (_always, _xor),
    aten.softshrink.default: (_always, _softshrink),
    aten.upsample_nearest1d.vec: (_is_uneven, _nearest),
    aten.upsample_nearest2d.vec: (_is_uneven, _nearest),
    aten.upsample_bilinear2d.vec: (_is_rounded, partial(_resized, op=aten.upsample_bilinear2d.vec)),
    aten.upsample_bicubic2d.vec: (_is_rounded, partial(_resized, op=aten.upsample_bicubic2d.vec)),
    aten.narrow.default: (_is_fixed, _narrow),
    aten.avg_pool2d.default: (_has_divisor, _avg_pool2d),
    aten.pixel_shuffle.default: (_always, _pixel_shuffle),
    aten.index.Tensor: (_is_placed, _index),
}


def arguments(node: fx.Node) -> dict[str, Any]:
    """What a formula is given of a node: indices one by one."""
    given = dict(node.kwargs)
    indices: Any = given.pop("indices", None) or ()
    return given | {f"i{axis}": one for axis, one in enumerate(indices) if one is not None}
