"""The affine map of each op that is one: convs, norms with stored statistics, pools, scales, sums, pads, splits and concats.

A value is read in one of two layouts: channels at dimension 1 and places behind it (convs), or channels last and no places (linears).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.passes.reparam._affine import Affine, add, conv, scale, with_shift
from sparsify_compiler.passes.reparam._compose import compose
from sparsify_compiler.passes.reparam._lattice import Inexact, Lattice
from sparsify_compiler.passes.reparam._maps_places import concat, indexed, joins_channels, keeps_batch, pad, part, slice_of, written_over
from sparsify_compiler.passes.reparam._space import Known, Space, named
from sparsify_compiler.pattern import op_name


def inputs(space: Space, node: fx.Node) -> list[fx.Node] | None:
    """The values of which this node is an affine map; None for an op that is none."""
    if node.op != "call_function" or not space.fits(node):
        return None
    if node.target is operator.getitem:
        parent = node.args[0]
        whole = named(parent).get("self") if isinstance(parent, fx.Node) and op_name(parent) in _SPLITS else None
        return [whole] if isinstance(whole, fx.Node) and space.fits(whole) else None
    entry = OPS.get(op_name(node))
    if entry is None or (entry.spatial and space.channels_last) or (entry.last and space.dim(node.meta["val"]) != node.meta["val"].dim() - 1):
        return None
    found = entry.values(node)
    values = [one for one in found if isinstance(one, fx.Node) and one not in space.fixed]
    if not values or not all(space.fits(one) and one.meta["val"].dim() == node.meta["val"].dim() for one in values):
        return None
    return values if _same_dtype(node, values) and (entry.when is None or entry.when(space, node)) else None


def apply(space: Space, node: fx.Node, known: Known) -> Affine:
    """The map from the source to this node's value, given those of its inputs. Raises Inexact with the reason where there is none."""
    if node.target is operator.getitem:
        return part(space, node, known)
    return OPS[op_name(node)].map(space, node, known)


def why_not(space: Space, node: fx.Node) -> str | None:
    """Why an op that usually is an affine map is none here; None where there is nothing to say."""
    name = op_name(node)
    if name == "batch_norm" and (named(node)["training"] or named(node).get("running_mean") is None):
        return "the norm is in training mode: it uses the statistics of the batch" if named(node)["training"] else (
            "the norm has no running statistics: it uses those of the batch")
    if (name == "linear" or name in _CONVS) and named(node)["weight"] not in space.fixed:
        return "the weight is no parameter"
    return None


# --- one function an op ----------------------------------------------------------------------------------------------------------------


def _conv(space: Space, node: fx.Node, known: Known) -> Affine:
    inner, weight, bias = known[named(node)["input"]], named(node)["weight"], named(node).get("bias")
    shape, rank = weight.meta["val"].shape, len(inner.lattices)
    if weight not in space.fixed or (bias is not None and bias not in space.fixed):
        raise Inexact("the weight is no parameter")
    if len(shape) != rank + 2 or isinstance(named(node).get("padding", 0), str):
        raise Inexact("the layout of the conv is another")
    stride, padding, dilation = (_tuple(named(node).get(name, default), rank) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)))
    lattices = [Lattice(-p, d, k, s, 2 * p - d * (k - 1) - 1) for p, d, k, s in zip(padding, dilation, shape[2:], stride, strict=True)]
    own = conv(shape, lambda: space.needed(weight), space.needed(bias) if bias is not None else None, int(named(node).get("groups", 1)), lattices,
               inner.output_places)
    return compose(own, inner, space.tolerance(node))


def _linear(space: Space, node: fx.Node, known: Known) -> Affine:
    inner = known[named(node)["input"]]
    if inner.lattices:
        raise Inexact("the layout of the linear is another")
    return _conv(space, node, known)


def _norm(space: Space, node: fx.Node, known: Known) -> Affine:
    value = node.meta["val"]
    if space.dim(value) != 1:
        raise Inexact("the norm's channels are not the linear's features")
    mean, var, weight, bias = (space.constant(named(node).get(name)) for name in ("running_mean", "running_var", "weight", "bias"))
    if why_not(space, node) is not None or mean is None or var is None:
        raise Inexact(why_not(space, node) or "the norm's statistics are no parameters")
    factor = torch.rsqrt(var + float(named(node)["eps"])) * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - mean * factor
    return _scaled(space, node, known[named(node)["input"]], factor, shift)


def _scaled(space: Space, node: fx.Node, inner: Affine, factor: Tensor, shift: Tensor) -> Affine:
    return compose(scale(factor, shift, inner.output_places), inner, space.tolerance(node))


def _pool(space: Space, node: fx.Node, known: Known) -> Affine:
    inner = known[named(node)["self"]]
    rank = len(inner.lattices)
    size = _tuple(named(node)["kernel_size"], rank)
    stride = _tuple(named(node).get("stride") or size, rank)
    padding = _tuple(named(node).get("padding", 0), rank)
    if any(padding) and not named(node).get("count_include_pad", True):
        raise Inexact("the border: the pool averages over fewer places there")
    if named(node).get("ceil_mode", False):
        raise Inexact("the pool rounds its size up: its last windows are cut")
    count = named(node).get("divisor_override") or torch.Size(size).numel()
    lattices = [Lattice(-p, 1, k, s, 2 * p - k) for p, k, s in zip(padding, size, stride, strict=True)]
    shape = (inner.outputs, 1, *size)
    own = conv(shape, lambda: torch.full(shape, 1.0 / count, dtype=torch.float64), None, inner.outputs, lattices, inner.output_places)
    return compose(own, inner, space.tolerance(node))


def _is_factor(space: Space, node: fx.Node) -> bool:
    """Does a constant scale each channel by itself?"""
    divides = op_name(node) == "div" and (named(node)["other"] not in space.fixed or named(node).get("rounding_mode") is not None)
    factors = [v for k, v in named(node).items() if k in ("self", "other", "tensor1", "tensor2")]
    constants = [v for v in factors if not isinstance(v, fx.Node) or v in space.fixed]
    return not (divides and isinstance(named(node)["other"], fx.Node)) and all(space.per_channel(c, node.meta["val"]) is not None for c in constants)


def _is_term(space: Space, node: fx.Node) -> bool:
    """Is the constant of a sum the same for every input of the batch?"""
    constants = [named(node)[name] for name in ("self", "other") if not isinstance(named(node)[name], fx.Node) or named(node)[name] in space.fixed]
    return all(space.added(constant, node.meta["val"]) is not None for constant in constants)


def _sum(space: Space, node: fx.Node, known: Known) -> Affine:
    one, other = named(node)["self"], named(node)["other"]
    sign = float(named(node).get("alpha", 1)) * (-1.0 if op_name(node) == "sub" else 1.0)
    if one in known and other in known:
        if one.meta["val"].shape != other.meta["val"].shape:
            raise Inexact("the sum broadcasts")
        return add(known[one], known[other], sign)
    value, constant, flipped = (one, other, False) if one in known else (other, one, True)
    shift, inner = space.added(constant, node.meta["val"]), known[value]
    if shift is None or value.meta["val"].shape != node.meta["val"].shape:
        raise Inexact("the constant of the sum is none of a channel")
    factor = torch.full((inner.outputs,), sign if flipped else 1.0, dtype=torch.float64)
    shift = shift if flipped else sign * shift
    vector = shift if shift.dim() == 1 else torch.zeros(inner.outputs, dtype=torch.float64)
    made = _scaled(space, node, inner, factor, vector)
    if shift.dim() == 1:
        return made
    return with_shift(made, made.shift.reshape(made.outputs, *[1] * len(made.lattices)) + shift if not made.spatial_shift else made.shift + shift,
                      space.tolerance(node))


def _product(space: Space, node: fx.Node, known: Known) -> Affine:
    one, other = named(node)["self"], named(node)["other"]
    value, constant = (one, other) if one in known else (other, one)
    factor = space.per_channel(constant, node.meta["val"])
    if factor is None or constant in known or value.meta["val"].shape != node.meta["val"].shape:
        raise Inexact("the factor is no constant of a channel")
    if op_name(node) == "div":
        if value is not one or named(node).get("rounding_mode") is not None:
            raise Inexact("a division by the value is not linear")
        factor = 1 / factor
    return _scaled(space, node, known[value], factor, torch.zeros_like(factor))


def _negative(space: Space, node: fx.Node, known: Known) -> Affine:
    inner = known[named(node)["self"]]
    factor = torch.full((inner.outputs,), -1.0, dtype=torch.float64)
    return _scaled(space, node, inner, factor, torch.zeros_like(factor))


def _fused_scale(space: Space, node: fx.Node, known: Known) -> Affine:
    """addcmul(shift, x, factor): what the collapse itself writes for a map that only scales."""
    one, other = named(node)["tensor1"], named(node)["tensor2"]
    value, constant = (one, other) if one in known else (other, one)
    shift, factor = space.per_channel(named(node)["self"], node.meta["val"]), space.per_channel(constant, node.meta["val"])
    if shift is None or factor is None or value not in known or value.meta["val"].shape != node.meta["val"].shape:
        raise Inexact("the factor or the shift is no constant of a channel")
    return _scaled(space, node, known[value], factor * float(named(node).get("value", 1)), shift)


@dataclass(frozen=True)
class Op:
    """How an op is read: the arguments that are values (those that are constants are left out later), and its map."""

    map: Callable[[Space, fx.Node, Known], Affine]
    names: tuple[str, ...] = ("self",)
    spatial: bool = False  # has its channels at dimension 1
    last: bool = False  # has its channels last
    when: Callable[[Space, fx.Node], bool] | None = None  # are its options and constants such that it is affine?

    def values(self, node: fx.Node) -> list[Any]:
        found = [named(node).get(name) for name in self.names]
        return list(found[0]) if len(found) == 1 and isinstance(found[0], list | tuple) else found


_CONVS = frozenset({"conv1d", "conv2d", "conv3d"})
_SPLITS = frozenset({"chunk", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "tensor_split"})
OPS: Mapping[str, Op] = {
    **dict.fromkeys(_CONVS, Op(_conv, ("input",), spatial=True)),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), Op(_pool, spatial=True)),
    **dict.fromkeys(("add", "sub"), Op(_sum, ("self", "other"), when=_is_term)),
    **dict.fromkeys(("mul", "div"), Op(_product, ("self", "other"), when=_is_factor)),
    **dict.fromkeys(("pad", "constant_pad_nd"), Op(pad)),
    **dict.fromkeys(("slice", "narrow"), Op(slice_of, when=keeps_batch)),
    **dict.fromkeys(("index", "index_select"), Op(indexed)),
    "linear": Op(_linear, ("input",), last=True),
    "batch_norm": Op(_norm, ("input",), spatial=True),
    "neg": Op(_negative),
    "addcmul": Op(_fused_scale, ("tensor1", "tensor2"), when=_is_factor),
    "slice_scatter": Op(written_over, spatial=True),
    "cat": Op(concat, ("tensors",), when=joins_channels),
}


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    items = tuple(value) if isinstance(value, list | tuple) else (value,)
    items = items * rank if len(items) == 1 else items
    if not all(isinstance(item, int) for item in items):
        raise Inexact("its options are dynamic")
    return items


def _same_dtype(node: fx.Node, values: Sequence[fx.Node]) -> bool:
    dtype = node.meta["val"].dtype
    return all(one.meta["val"].dtype == dtype for one in values)
