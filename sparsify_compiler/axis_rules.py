"""What ops do to dimensions: products, norms, attention, elementwise. Those that only rearrange are in axis_layout.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from .axis import ONE, Axis
from .axis_follow import Dims, Follow, Rule
from .axis_layout import LAYOUT_RULES, product
from .normal_form_edit import argument, aten
from .site_graph import ACTIVATIONS

_TAKES_SHAPE = (aten.to.dtype, aten.clone.default, aten.contiguous.default, aten.zeros_like.default, aten.ones_like.default,
                aten.full_like.default, aten.empty_like.default, aten.detach.default, aten.fill.Scalar, aten.masked_fill.Scalar)


def elementwise(f: Follow, node: Any) -> Dims:
    """Dimensions of all inputs that are not broadcast are one."""
    sizes = node.meta["val"].shape
    inputs = [dims for source in node.all_input_nodes if (dims := f.of(source)) or _is_tensor(source)]
    result: list[Axis | None] = []
    for d in range(-len(sizes), 0):
        there = [dims[d] for dims in inputs if len(dims) >= -d]
        real = [axis for axis in there if axis is None or f.axes.size(axis) != 1]
        for other in real[1:]:
            f.same(real[0], other)
        result.append(None if None in real else real[0] if real else ONE)
    if node.target in (aten.add.Tensor, aten.sub.Tensor) and sum(_is_tensor(s) and s not in f.constants for s in node.all_input_nodes) == 2:
        for axis in result:
            f.mark("sum", axis, node)
    return tuple(result)


def linear(f: Follow, node: Any) -> Dims:
    """Rows of the weight are the result's features, columns the input's."""
    given, weight = f.of(node.kwargs["input"]), f.of(node.kwargs["weight"])
    f.same(given[-1], weight[1])
    if isinstance(node.kwargs.get("bias"), fx.Node):
        f.same(weight[0], f.of(node.kwargs["bias"])[0])
    return (*given[:-1], weight[0])


def convolution(f: Follow, node: Any) -> Dims:
    """Filters are the result's channels; of one in groups, the input's and the result's channels are groups x channels in each."""
    given, weight, groups = f.of(node.kwargs["input"]), f.of(node.kwargs["weight"]), int(argument(node, "groups"))
    value: Tensor = node.meta["val"]
    channel = len(given) - len(weight) + 1
    f.fix(weight[2:], "is a dimension of a kernel")
    f.fix(given[channel + 1:], f"{f.cause} slides over it")
    out, read = weight[0], weight[1]
    if groups > 1 and out is not None and read is not None:
        each = f.axes.new(groups)
        inside = f.axes.new(f.axes.size(out) // groups)
        f.same(out, product(f, (each, inside)))
        read = product(f, (each, read))
    f.same(given[channel], read)
    if isinstance(node.kwargs.get("bias"), fx.Node):
        f.same(out, f.of(node.kwargs["bias"])[0])
    return (*given[:channel], out, *f.fresh(value, "is a place in an image")[channel + 1:])


def channel_norm(f: Follow, node: Any) -> Dims:
    """batch_norm, instance_norm, prelu: vectors along dimension 1."""
    given = f.of(node.kwargs.get("input", node.kwargs.get("self")))
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(node.kwargs.get(name), fx.Node):
            vector = f.of(node.kwargs[name])
            if vector and vector[0] != ONE:
                f.same(given[1 if len(given) > 1 else 0], vector[0])
    return given


def feature_norm(f: Follow, node: Any) -> Dims:
    """layer_norm, rms_norm: over the last dimensions. It shrinks with them, and then sees fewer."""
    given, count = f.of(node.kwargs["input"]), len(node.kwargs["normalized_shape"])
    for name in ("weight", "bias"):
        if isinstance(node.kwargs.get(name), fx.Node):
            for axis, own in zip(given[-count:], f.of(node.kwargs[name]), strict=True):
                f.same(axis, own)
    f.mark("normed", given[-1], node)
    return given


def embedding(f: Follow, node: Any) -> Dims:
    """Rows are picked by the input, columns are features."""
    weight = f.of(node.kwargs["weight"])
    f.fix(weight[0], f"{f.cause} picks its entries by the input")
    return (*f.of(node.kwargs["indices"]), weight[1])


def attention(f: Follow, node: Any) -> Dims:
    """Heads of q, k and v are one, of k and v repeated under enable_gqa. A mask for each head is cut where it is read."""
    q, k, v = (f.of(node.kwargs[name]) for name in ("query", "key", "value"))
    f.same(q[-1], k[-1])
    f.same(k[-2], v[-2])
    for i in range(len(q) - 2):
        f.same(k[i], v[i])
        one, own = q[i], k[i]
        if one is not None and own is not None and f.axes.size(own) < f.axes.size(one):
            own = product(f, (own, f.axes.new(f.axes.size(one) // f.axes.size(own)))) if f.axes.size(own) > 1 else one
        f.same(one, own)
    if len(q) > 2:
        f.mark("heads", q[-3], node)
    f.mark("head_dim", q[-1], node)
    f.mark("head_dim", v[-1], node)
    f.fix(f.of(node.kwargs.get("attn_mask")), f"{f.cause} reads it as a mask")
    for axis in (q[-2], k[-2]):
        f.fix(axis, f"{f.cause} attends over it")
    return (*q[:-1], v[-1])


def matmul(f: Follow, node: Any) -> Dims:
    """The dimension that is summed over is one, those before broadcast."""
    a, b = f.of(node.kwargs["self"]), f.of(node.kwargs.get("other", node.kwargs.get("mat2")))
    if len(a) < 2 or len(b) < 2:
        result: Dims = f.opaque(node)
        return result
    f.same(a[-1], b[-2])
    lead: list[Axis | None] = []
    for d in range(-max(len(a), len(b)), -2):
        there = [dims[d] for dims in (a, b) if len(dims) >= -d and (dims[d] is None or f.axes.size(dims[d] or ()) != 1)]
        for other in there[1:]:
            f.same(there[0], other)
        lead.append(None if None in there else there[0] if there else ONE)
    return (*lead, a[-2], b[-1])


def pooled(f: Follow, node: Any) -> Dims:
    """Pools over the last dimensions: the others stay what they are."""
    given = f.of(node.kwargs["self"])
    over = int(str(node.target).partition("pool")[2][0])
    f.fix(given[-over:], f"{f.cause} slides over it")
    return (*given[:-over], *f.fresh(node.meta["val"], "is a place in an image")[-over:])


def reduced(f: Follow, node: Any) -> Dims:
    """mean, sum and the like over some dimensions, which then cannot shrink."""
    given = f.of(node.kwargs["self"])
    over = argument(node, "dim")
    places = range(len(given)) if not over and over != 0 else [d % len(given) for d in ([over] if isinstance(over, int) else over)]
    f.fix([given[d] for d in places], f"{f.cause} goes over it")
    if argument(node, "keepdim"):
        return tuple(ONE if d in places else axis for d, axis in enumerate(given))
    return tuple(axis for d, axis in enumerate(given) if d not in places)


def softmax(f: Follow, node: Any) -> Dims:
    """Over one dimension, which cannot shrink."""
    given = f.of(node.kwargs["self"])
    f.fix(given[argument(node, "dim")], f"{f.cause} goes over it")
    return given


def padded(f: Follow, node: Any) -> Dims:
    """Zeros around the last dimensions: those cannot shrink."""
    given, pads = f.of(node.kwargs["self"]), list(node.kwargs["pad"])
    new = f.fresh(node.meta["val"], "is padded")
    touched = {len(given) - 1 - i // 2 for i, pad in enumerate(pads) if pad != 0}
    f.fix([given[d] for d in touched], f"{f.cause} pads it")
    return tuple(new[d] if d in touched else axis for d, axis in enumerate(given))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


class _Rules(dict[Any, Rule]):
    """The rules by op; every pointwise op has the same one."""

    def get(self, op: Any, default: Any = None) -> Any:
        found = super().get(op, default)
        pointwise = isinstance(op, OpOverload) and (torch.Tag.pointwise in op.tags or op in ACTIVATIONS or op in _TAKES_SHAPE)
        return elementwise if found is None and pointwise else found


RULES: Mapping[Any, Rule] = _Rules({
    **LAYOUT_RULES,
    aten.linear.default: linear,
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), convolution),
    **dict.fromkeys((aten.batch_norm.default, aten.instance_norm.default, aten.prelu.default), channel_norm),
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), feature_norm),
    aten.embedding.default: embedding,
    aten.scaled_dot_product_attention.default: attention,
    **dict.fromkeys((aten.matmul.default, aten.bmm.default), matmul),
    **dict.fromkeys((aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.avg_pool1d.default, aten.avg_pool2d.default,
                     aten.max_pool1d.default, aten.max_pool2d.default), pooled),
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default), reduced),
    **dict.fromkeys((aten.softmax.int, aten.log_softmax.int), softmax),
    **dict.fromkeys((aten.constant_pad_nd.default, aten.pad.default), padded),
})
