"""Attention of a graph by attend_dense.py: tensors as the layers before left them, masks without what is always true."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from tvm import relax, tirx

from sparsify_compiler.codegen.kernels.attend_dense import AttendDense
from sparsify_compiler.codegen.kernels.cache_write import CacheWrite
from sparsify_compiler.codegen.kernels.mask_dense import Mask
from sparsify_compiler.target import Target

if TYPE_CHECKING:
    from sparsify_compiler.codegen.whole_graph_import import GraphImporter

aten = torch.ops.aten
VIEWS = (aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.view.default, aten.to.dtype, aten.slice.Tensor, aten.transpose.int)


def attend(graph: GraphImporter, node: fx.Node) -> Any:
    """scaled_dot_product_attention in float32."""
    query, key, value, mask, dropout, causal, scale, grouped = _arguments(node)
    sizes = [one.meta["val"] for one in (query, key, value)]
    heads, groups, width, value_width = sizes[0].shape[1], sizes[1].shape[1], sizes[0].shape[-1], sizes[2].shape[-1]
    static = all(isinstance(size, int) for size in (heads, groups, width, value_width))
    if not static or dropout or any(one.dtype is not torch.float32 or one.dim() != 4 for one in sizes) or (heads != groups and not grouped):
        return graph.plain(node)
    given = [_as_it_lies(one) for one in (query, key, value)]
    added = None if mask is None else graph.value(_without_truths(mask))
    out = _turned(node)
    target = graph.parts.target
    lies = given[0][1], given[1][1], given[2][1], "bhsd" if out is node else "bshd"
    schedule = AttendDense(width, value_width, heads, groups, 1 / math.sqrt(width) if scale is None else float(scale), bool(causal),
                           Mask() if added is None else _mask_of(added), lies, False, *registers(target), workers=target.cores)
    from sparsify_compiler.codegen.whole_graph_convert import one_kernel

    inputs = [graph.value(one) for one, _ in given] + ([] if added is None else [added])
    result = one_kernel(graph, schedule, inputs, graph.shape(out))
    if out is not node:
        graph.env[out] = result
    return result


def attend_cached(graph: GraphImporter, node: fx.Node) -> Any:
    """Causal attention of new tokens over a cache that they are written into, in place: (query, key, value, past, key cache, value cache, scale)."""
    query, key, value, past, *caches, scale = node.args
    target, given = graph.parts.target, [_as_it_lies(one) for one in (query, key, value)]  # type: ignore[arg-type]
    sizes: list[Any] = [one.meta["val"].shape for one in (query, key, value)]  # type: ignore[union-attr]
    heads, groups, width, value_width = sizes[0][1], sizes[1][1], sizes[0][3], sizes[2][3]
    written = [_written(graph, cache, one, past, groups, size[3]) for cache, one, size in zip(caches, given[1:], sizes[1:], strict=True)]
    out = _turned(node)
    lies = given[0][1], "bhsd", "bhsd", "bhsd" if out is node else "bshd"
    schedule = AttendDense(width, value_width, heads, groups, 1 / math.sqrt(width) if scale is None else float(scale), True,  # type: ignore[arg-type]
                           Mask(), lies, True, *registers(target), workers=target.cores)
    from sparsify_compiler.codegen.whole_graph_convert import one_kernel

    result = one_kernel(graph, schedule, [graph.value(given[0][0]), *written, graph.value(past)], graph.shape(out))
    if out is not node:
        graph.env[out] = result
    return result


def _written(graph: GraphImporter, cache: Any, new: tuple[fx.Node, str], past: Any, groups: int, width: int) -> Any:
    """The cache with new rows in it."""
    from sparsify_compiler.codegen.whole_graph_convert import kernel_of

    inputs = [graph.value(one) for one in (cache, new[0], past)]
    kernel = kernel_of(graph, CacheWrite(width, groups, new[1], graph.parts.target.cores), inputs, ())
    return graph.block_builder.emit(relax.op.call_tir_inplace(kernel, inputs, 0, inputs[0].ty))


def registers(target: Target) -> tuple[int, int, int]:
    """Lanes, vectors of rows, and keys together, that fill the registers of a target: sums in about half of them."""
    lanes = target.vector_bytes // 4
    return (lanes, 2, target.vector_registers // 4) if target.arch == "x86_64" else (lanes, 4, target.vector_registers // 8)


def _arguments(node: fx.Node) -> list[Any]:
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return [node.args[i] if i < len(node.args) else node.kwargs.get(one.name, one.default_value) for i, one in enumerate(schema)]


def _as_it_lies(node: fx.Node) -> tuple[fx.Node, str]:
    """The tensor before it was turned from [B, S, H, D] to [B, H, S, D], where it was."""
    if node.target is aten.transpose.int and {dim % 4 for dim in _transposed(node)} == {1, 2}:
        return node.args[0] if node.args else node.kwargs["self"], "bshd"  # type: ignore[return-value]
    return node, "bhsd"


def _transposed(node: fx.Node) -> tuple[int, int]:
    return (node.args[1], node.args[2]) if node.args else (node.kwargs["dim0"], node.kwargs["dim1"])  # type: ignore[return-value]


def _turned(node: fx.Node) -> fx.Node:
    """The node that turns the result to [B, S, H, D], where it is the only one that reads it."""
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.transpose.int and {dim % 4 for dim in _transposed(users[0])} == {1, 2}:
        return users[0]
    return node


def _mask_of(added: Any) -> Mask:
    varies = [not (isinstance(size, tirx.IntImm) and int(size) == 1) for size in added.ty.shape]
    dtype = str(added.ty.dtype.dtype if hasattr(added.ty.dtype, "dtype") else added.ty.dtype)
    return Mask("bool" if dtype == "bool" else "float32", (varies[0], varies[1], varies[2]))


def _without_truths(mask: fx.Node) -> fx.Node:
    """The mask without operands of `and` that are true everywhere; it may be smaller then, for the kernel to broadcast."""
    while mask.target in (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default):
        first, second = [one for one in (*mask.args, *mask.kwargs.values()) if isinstance(one, fx.Node)]
        kept = second if _is_true(first) else first if _is_true(second) else None
        if kept is None or kept.meta["val"].dim() != 4:
            break
        mask = kept
    return mask


def _is_true(node: Any) -> bool:
    """Is it a tensor of truths whatever the inputs are: ones, or "a place is not negative"?"""
    inputs = [one for one in (*node.args, *node.kwargs.values()) if isinstance(one, fx.Node)]
    if node.target in (aten.new_ones.default, aten.ones.default):
        return True
    if node.target in (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default):
        return all(map(_is_true, inputs))
    if node.target is aten.ge.Scalar and (node.args[1] if len(node.args) > 1 else node.kwargs["other"]) == 0:
        return _counts(inputs[0])
    return node.target in VIEWS and _is_true(inputs[0])


def _counts(node: fx.Node) -> bool:
    """Is it made of arange from 0 on?"""
    while node.target in VIEWS:
        node = node.args[0] if node.args else node.kwargs["self"]  # type: ignore[assignment]
    return node.target is aten.arange.default
