"""Operators that whole graphs compute by kernels of ours, or translate better than TVM's importer: sizes come from the captured graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from tvm import relax

from sparsify_compiler.codegen.kernels.finish import finish_of
from sparsify_compiler.codegen.kernels.mean_rows import MeanRows
from sparsify_compiler.codegen.kernels.norm_rows import NormRows
from sparsify_compiler.codegen.kernels.pointwise_flat import PointwiseFlat
from sparsify_compiler.codegen.kernels.softmax_rows import SoftmaxRows
from sparsify_compiler.codegen.whole_graph_attention import attend, attend_blocked, attend_cached, attend_step
from sparsify_compiler.codegen.whole_graph_extremes import best, lossy, top_rows
from sparsify_compiler.codegen.whole_graph_functions import Parameter, arguments_of, chosen, declared, intervals
from sparsify_compiler.codegen.whole_graph_planes import LaidPlanes
from sparsify_compiler.errors import KernelError

if TYPE_CHECKING:
    from sparsify_compiler.codegen.whole_graph_import import GraphImporter

FLOATS = ("float32", "bfloat16")    # that kernels of ours read and write
ACTIVATIONS = ("relu", "relu6", "hardtanh", "leaky_relu", "hardsigmoid", "hardswish", "sigmoid", "silu", "gelu")


def product(graph: GraphImporter, node: fx.Node) -> Any:
    """A linear layer, by the variant of its kernels for the number of rows; or a convolution."""
    found = graph.source.products[node]
    laid, other = found.laid, () if found.other is None else (graph.value(found.other),)
    if isinstance(laid, LaidPlanes):
        state = [graph.parameter(f"{found.name}:{part}", tensor) for part, tensor in laid.state.items()]
        inputs = [*state, graph.value(found.x), *other]
        return graph.call(graph.kernel_of(laid.schedule, [*map(_any_size, inputs), Parameter((None,) * 4, "float32")]), inputs, graph.shape(node))
    state = [graph.parameter(f"{found.name}:{part}", tensor) for part, tensor in laid.prepared.arguments().items()]
    inputs = [graph.value(found.x), *map(graph.value, found.given), *state, *other]
    shape = graph.shape(node)
    low, high = _rows(found.x)
    pieces = intervals(laid.variants, low, high)
    key = tuple((repr(laid.variants.schedules[variant]), first, last) for variant, first, last in pieces)
    out = Parameter((None,) * len(shape), str(laid.prepared.dtype).removeprefix("torch."))
    kernel = graph.parts.kernel(key, [*map(_any_size, inputs), out], lambda buffers: chosen(laid.variants, buffers, low, high), "product")
    return graph.call(kernel, inputs, shape, out.dtype)


def _any_size(value: Any) -> Parameter:
    """Layers of all sizes share their code."""
    one = declared(value)
    return Parameter((None,) * len(one.shape), one.dtype)


def _mean(graph: GraphImporter, node: fx.Node) -> Any:
    """The mean over the last dimensions."""
    x, given = node.args[0], node.args[1] if len(node.args) > 1 else None
    shape: list[Any] = graph.shape(x)  # type: ignore[arg-type]
    dims = sorted(dim % len(shape) for dim in (given if isinstance(given, list | tuple) else range(len(shape))))
    sizes = [shape[dim] for dim in dims]
    if not dims or dims != list(range(dims[0], len(shape))) or not all(isinstance(size, int) for size in sizes) or not _are_float32(node, x):
        return graph.plain(node)
    return _pooled(graph, x, math.prod(sizes), shape[: dims[0]], graph.shape(node))


def _pool(graph: GraphImporter, node: fx.Node) -> Any:
    """Adaptive pooling to one pixel is the mean of a plane."""
    x, out = node.args[:2]
    shape: list[Any] = graph.shape(x)  # type: ignore[arg-type]
    one_pixel = list(out if isinstance(out, list | tuple) else [out]) in ([1, 1], [1])
    if not one_pixel or not all(isinstance(n, int) for n in shape[-2:]) or not _are_float32(node):
        return graph.plain(node)
    return _pooled(graph, x, math.prod(shape[-2:]), shape[:-2], graph.shape(node))


def _pooled(graph: GraphImporter, x: Any, size: int, outer: list[Any], shape: list[Any]) -> Any:
    rows = _in_shape(graph, graph.value(x), [*outer, size])
    return _in_shape(graph, graph.one_kernel(MeanRows(size, graph.parts.target.cores), [rows], outer), shape)


def _in_shape(graph: GraphImporter, value: Any, shape: list[Any]) -> Any:
    return graph.block_builder.emit(relax.op.reshape(value, shape))


def _rows(x: fx.Node) -> tuple[int, int | None]:
    """Least and largest number of rows that a layer's input has."""
    sizes = x.meta["val"].shape[:-1]
    if all(isinstance(size, int) for size in sizes):
        return math.prod(sizes), math.prod(sizes)
    return 1, None


def _are_float32(*nodes: Any) -> bool:
    return all(node.meta["val"].dtype is torch.float32 for node in nodes)


def dtype_of(node: Any) -> str:
    """Of a node's value, by its short name."""
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _norm(centred: bool) -> Callable[[GraphImporter, fx.Node], Any]:
    def convert(graph: GraphImporter, node: fx.Node) -> Any:
        x, sizes, weight, bias, eps = _norm_arguments(node, centred)
        given = [one for one in (weight, bias) if one is not None]
        inputs = [graph.value(one) for one in (x, *given)]
        dtypes = [dtype_of(node), *(declared(one).dtype for one in inputs)]
        if len(sizes) != 1 or dtypes[0] != dtypes[1] or not set(dtypes) <= set(FLOATS) or len(set(dtypes[2:])) > 1:
            return graph.plain(node)
        schedule = NormRows(int(sizes[0]), eps, centred, weight is not None, bias is not None, graph.parts.target.cores, (dtypes[0], dtypes[-1]))
        return graph.one_kernel(schedule, inputs, graph.shape(node), dtypes[0])

    return convert


def _norm_arguments(node: fx.Node, centred: bool) -> tuple[fx.Node, Any, Any, Any, float]:
    x, sizes, weight, *rest = arguments_of(node)
    if centred:
        return x, sizes, weight, rest[0], float(rest[1])
    eps = rest[0] if rest[0] is not None else torch.finfo(node.meta["val"].dtype).eps
    return x, sizes, weight, None, float(eps)


def _softmax(graph: GraphImporter, node: fx.Node) -> Any:
    x, dim = node.args[:2]
    assert isinstance(x, fx.Node)
    shape = x.meta["val"].shape
    if dim not in (-1, len(shape) - 1) or not isinstance(shape[-1], int) or not _are_float32(node, x):
        return graph.plain(node)
    return graph.one_kernel(SoftmaxRows(shape[-1], graph.parts.target.cores), [graph.value(x)], graph.shape(node))


def _activation(graph: GraphImporter, node: fx.Node) -> Any:
    name = str(node.target).split(".")[1]
    operator: Any = node.target
    arguments = dict(zip([one.name for one in operator._schema.arguments], arguments_of(node), strict=True))
    del arguments["self"]
    finish, dtype = finish_of({"activation": name, "arguments": arguments}), dtype_of(node)
    if finish is None or dtype not in FLOATS or dtype != dtype_of(node.args[0]):
        return graph.plain(node)
    return graph.one_kernel(PointwiseFlat(finish, graph.parts.target.cores, dtype), [graph.value(node.args[0])], graph.shape(node), dtype)


def _view(graph: GraphImporter, node: fx.Node) -> Any:
    """The same elements in another shape."""
    return _in_shape(graph, graph.value(node.args[0]), graph.shape(node))


def _turn(graph: GraphImporter, node: fx.Node) -> Any:
    """A matrix on its side."""
    return graph.block_builder.emit(relax.op.permute_dims(graph.value(node.args[0])))


def _expand(graph: GraphImporter, node: fx.Node) -> Any:
    return graph.block_builder.emit(relax.op.broadcast_to(graph.value(node.args[0]), graph.shape(node)))


def _size_of(graph: GraphImporter, node: fx.Node) -> Any:
    value = node.meta.get("val")
    if value is None:
        return graph.shape(node.args[0])[node.args[1]]  # type: ignore[arg-type, index]
    return graph.size(value)


def _select(graph: GraphImporter, node: fx.Node) -> Any:
    x, dim, index = node.args
    source = graph.shape(x)  # type: ignore[arg-type]
    dim, start = int(dim) % len(source), int(index)  # type: ignore[arg-type]
    begin = start if start >= 0 else source[dim] + start
    sliced = graph.block_builder.emit(relax.op.strided_slice(graph.value(x), [dim], [begin], [begin + 1], assume_inbound=True))
    return _in_shape(graph, sliced, graph.shape(node))


def _slice(graph: GraphImporter, node: fx.Node) -> Any:
    given: list[Any] = list(node.args)
    x, dim, start, _, step = given + [0, None, None, 1][len(given) - 1:]
    sizes, wanted = graph.shape(x), graph.shape(node)
    dim = int(dim) % len(sizes)
    begin = 0 if start is None else graph.value(start)
    if isinstance(begin, int) and begin < 0:
        begin = sizes[dim] + begin
    if isinstance(begin, int) and begin == 0 and step == 1 and _same(sizes[dim], wanted[dim]):
        return graph.value(x)
    end = begin + wanted[dim] * step
    return graph.block_builder.emit(relax.op.strided_slice(graph.value(x), [dim], [begin], [end], [step], assume_inbound=True))


def _embedding(graph: GraphImporter, node: fx.Node) -> Any:
    """Rows of a table. An index outside of it reads the nearest row: there is no way to tell the caller, and nothing else may be read."""
    table, indices = (graph.value(one) for one in node.args[:2])
    flat = _in_shape(graph, indices, [-1]) if len(indices.ty.shape) > 1 else indices
    rows = graph.block_builder.emit(relax.op.take(table, flat, axis=0, mode="clip"))
    return _in_shape(graph, rows, graph.shape(node))


def _cumsum(graph: GraphImporter, node: fx.Node) -> Any:
    """In the dtype of the sums: TVM would add up truths."""
    x, dim = node.args[:2]
    return graph.block_builder.emit(relax.op.cumsum(_in_dtype(graph, graph.value(x), node), dim))


def _in_dtype(graph: GraphImporter, value: Any, node: fx.Node) -> Any:
    """A number or a tensor in the dtype of a node's value."""
    dtype = dtype_of(node)
    if isinstance(value, int | float):
        return relax.const(value, dtype)
    return value if declared(value).dtype == dtype else graph.block_builder.emit(relax.op.astype(value, dtype))


def _where(graph: GraphImporter, node: fx.Node) -> Any:
    """One of two, each a tensor or a number."""
    condition, *both = (graph.value(one) for one in node.args)
    return graph.block_builder.emit(relax.op.where(condition, *(_in_dtype(graph, one, node) for one in both)))


def _extreme(operator: Callable[..., Any]) -> Callable[[GraphImporter, fx.Node], Any]:
    def convert(graph: GraphImporter, node: fx.Node) -> Any:
        x, dims, keep = arguments_of(node)
        return graph.block_builder.emit(operator(graph.value(x), list(dims) if isinstance(dims, list | tuple) else [dims], bool(keep)))

    return convert


def _topk(graph: GraphImporter, node: fx.Node) -> Any:
    x, _, dim, largest, _ = arguments_of(node)
    return _top(graph, node, x, dim, largest)


def _sort(graph: GraphImporter, node: fx.Node) -> Any:
    x, dim, descending = arguments_of(node)
    return _top(graph, node, x, dim, descending)


def _top(graph: GraphImporter, node: fx.Node, x: Any, dim: int, largest: bool) -> tuple[Any, Any]:
    """Values and places of the last dimension: all that there are is sorting."""
    seen, places = x.meta["val"], node.meta["val"][1]
    if dim not in (-1, seen.dim() - 1) or seen.dtype is not torch.float32:
        raise KernelError("whole graphs sort numbers of float32, along the last dimension", where=node.name,
                          hint="save() keeps the model for PyTorch")
    return top_rows(graph, graph.value(x), [graph.size(size) for size in places.shape], largest)


def _item(graph: GraphImporter, node: fx.Node) -> Any:
    given: list[Any] = list(node.args)
    values = graph.value(given[0])
    return values[given[1]] if isinstance(values, tuple) else graph.plain(node)


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) if isinstance(a, int) and isinstance(b, int) else a is b or (hasattr(a, "same_as") and a.same_as(b))


CONVERTERS: Mapping[str, Callable[[GraphImporter, fx.Node], Any]] = {
    "product": product,
    "layer_norm.default": _norm(True), "rms_norm.default": _norm(False), "softmax.int": _softmax, "_softmax.default": _softmax,
    **{f"{name}.default": _activation for name in ACTIVATIONS},
    "reshape.default": _view, "view.default": _view, "flatten.using_ints": _view, "unflatten.int": _view, "unsqueeze.default": _view,
    "squeeze.dim": _view, "squeeze.dims": _view, "squeeze.default": _view, "expand.default": _expand, "t.default": _turn,
    "sym_size.int": _size_of, "select.int": _select,
    "slice.Tensor": _slice, "embedding.default": _embedding, "mean.dim": _mean, "adaptive_avg_pool2d.default": _pool,
    "amin.default": _extreme(lambda x, dims, keep: relax.op.min(x, dims or None, keep)),
    "amax.default": _extreme(lambda x, dims, keep: relax.op.max(x, dims or None, keep)),
    **{f"where.{kind}": _where for kind in ("self", "ScalarOther", "ScalarSelf", "Scalar")}, "cumsum.default": _cumsum,
    "max.dim": best(True), "min.dim": best(False), "argmax.default": best(True), "argmin.default": best(False),
    **dict.fromkeys(("median.default", "median.dim", "atan2.default"), lossy), "topk.default": _topk, "sort.default": _sort, "getitem": _item,
    "scaled_dot_product_attention.default": attend, "attend_cached": attend_cached, "attend_blocked": attend_blocked, "attend_step": attend_step,
}  # fmt: skip
