"""Attention of a graph by attend_dense.py: tensors as the layers before left them, masks without what is always true."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from tvm import relax

from sparsify_compiler.codegen.kernels.attend_dense import AttendDense
from sparsify_compiler.codegen.kernels.attend_step import AttendStep
from sparsify_compiler.codegen.kernels.blocks_dense import Blocks
from sparsify_compiler.codegen.kernels.cache_write import CacheWrite
from sparsify_compiler.codegen.kernels.mask_dense import Mask
from sparsify_compiler.codegen.vectors import multiplies_pairs
from sparsify_compiler.codegen.whole_graph_blocks import Read, blocks_of
from sparsify_compiler.codegen.whole_graph_functions import arguments_of, declared
from sparsify_compiler.errors import KernelError
from sparsify_compiler.target import Target

if TYPE_CHECKING:
    from sparsify_compiler.codegen.whole_graph_import import GraphImporter

aten = torch.ops.aten
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDE = 32       # registers in which sums of four vectors of rows and four keys leave room for the rows
VIEWS = (aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.view.default, aten.to.dtype, aten.slice.Tensor, aten.transpose.int)


def attend(graph: GraphImporter, node: fx.Node) -> Any:
    """scaled_dot_product_attention; bfloat16 as it is where the target multiplies pairs of it, else in float32."""
    query, key, value, mask, dropout, causal, scale, grouped = arguments_of(node)
    tensors = [one.meta["val"] for one in (query, key, value)]
    if any(one.dtype not in FLOATS or one.dim() != 4 for one in tensors):
        return graph.plain(node)
    shapes = [one.shape for one in tensors]
    heads, groups = shapes[0][1], shapes[1][1]
    static = all(isinstance(size, int) for size in (heads, groups, shapes[0][3], shapes[2][3]))
    if not static or dropout or (heads != groups and not grouped):
        return graph.plain(node)
    given = [_as_it_lies(one) for one in (query, key, value)]
    added = [] if mask is None else [_mask(graph, _without_truths(mask), shapes[1][2])]
    target = graph.parts.target
    pairs = multiplies_pairs(target) and {one.dtype for one in tensors} == {torch.bfloat16} and in_pairs(shapes[0][3], shapes[2][3], target)
    read = graph.value if pairs else partial(in_float32, graph)
    inputs, lies = [*(read(one) for one, _ in given), *added], [lie for _, lie in given]
    return _one_kernel(graph, node, inputs, shapes, lies, bool(causal), _mask_of(added[0]) if added else Mask(), scale,
                       dtype="bfloat16" if pairs else "float32")


def in_pairs(width: int, value_width: int, target: Target) -> bool:
    """Are rows of queries, keys and values whole vectors of pairs?"""
    return width % (target.vector_bytes // 2) == 0 and value_width % (target.vector_bytes // 4) == 0


def in_float32(graph: GraphImporter, node: fx.Node) -> Any:
    """The value of a node, which kernels of float32 take."""
    value = graph.value(node)
    return value if declared(value).dtype == "float32" else graph.block_builder.emit(relax.op.astype(value, "float32"))


def attend_cached(graph: GraphImporter, node: fx.Node) -> Any:
    """Causal attention of new tokens over a cache that they are written into, in place.

    Its arguments are query, key, value, past, key cache, value cache, scale, and those of blocks.
    """
    tensors: Any = node.args[:3]
    more: Any = node.args[3:7]
    past, *caches, scale = more
    given, shapes = [_as_it_lies(one) for one in tensors], [one.meta["val"].shape for one in tensors]
    written = [_written(graph, cache, one, past, shape[1], shape[3]) for cache, one, shape in zip(caches, given[1:], shapes[1:], strict=True)]
    query, heads = in_float32(graph, given[0][0]), shapes[0][1]
    read = Read(query, written[0], (given[0][1], "bhsd"), (shapes[0], shapes[1]), scale, True, past=(graph.value(past),))
    blocks, more = blocks_of(graph, node, "", read)
    step = _step(graph, node, shapes, scale, blocks)
    if step is not None:
        rows = graph.block_builder.emit(relax.op.reshape(query, [-1, shapes[0][3]]))
        return _finished(graph, node, step, [rows, *written, graph.value(past), *more], [graph.size(shapes[0][0]) * heads, shapes[2][3]])
    inputs = [query, *written, graph.value(past), *more]
    return _one_kernel(graph, node, inputs, shapes, [given[0][1], "bhsd", "bhsd"], True, Mask(), scale, True, blocks)


def attend_step(graph: GraphImporter, node: fx.Node) -> Any:
    """The same of one token, whose texts begin at places of their own: (query, key, value, past, starts, key cache, value cache, scale)."""
    tensors: Any = node.args[:3]
    past, starts, *caches, scale = node.args[3:8]
    given, shapes = [_as_it_lies(one) for one in tensors], [one.meta["val"].shape for one in tensors]
    step = _step(graph, node, shapes, scale, None, declared(graph.value(caches[0])).dtype)
    if step is None:
        raise KernelError(f"heads are {shapes[0][3]} and {shapes[2][3]} wide, which are no whole vectors", where=node.name)
    written = [_written(graph, cache, one, past, shape[1], shape[3]) for cache, one, shape in zip(caches, given[1:], shapes[1:], strict=True)]
    rows = graph.block_builder.emit(relax.op.reshape(in_float32(graph, given[0][0]), [-1, shapes[0][3]]))
    return _finished(graph, node, step, [rows, *written, graph.value(past), graph.value(starts)],
                     [graph.size(shapes[0][0]) * shapes[0][1], shapes[2][3]])


def _step(graph: GraphImporter, node: fx.Node, shapes: list[Any], scale: Any, blocks: Blocks | None, cached: str = "") -> AttendStep | None:
    """The kernel of one token for each text, where this function gets no more and its widths are whole vectors.

    cached  dtype of the caches, of a step that is given where texts start
    """
    target = graph.parts.target
    (_, heads, _, width), (_, groups, _, _), (_, _, _, value_width) = shapes
    lanes = target.vector_bytes // 4
    if not graph.source.one_token or width % lanes or value_width % lanes:
        return None
    factor = 1 / math.sqrt(width) if scale is None else float(scale)
    return AttendStep(width, value_width, heads, groups, factor, lanes, target.vector_registers // 2, target.cores, blocks, cached or "float32",
                      bool(cached))


def attend_blocked(graph: GraphImporter, node: fx.Node) -> Any:
    """Attention over the blocks of a table: (query, key, value, mask, whether causal, where texts start, scale, of blocks)."""
    tensors: Any = node.args[:3]
    rest: Any = node.args[3:7]
    mask, causal, starts, scale = rest
    given, shapes = [_as_it_lies(one) for one in tensors], [one.meta["val"].shape for one in tensors]
    added = [] if mask is None else [_mask(graph, _without_truths(mask), shapes[1][2])]
    floats, lie, facts = [in_float32(graph, one) for one, _ in given], [lie for _, lie in given], _mask_of(added[0]) if added else Mask()
    read = Read(floats[0], floats[1], (lie[0], lie[1]), (shapes[0], shapes[1]), scale, bool(causal), tuple(added), facts)
    blocks, more = blocks_of(graph, node, str(starts), read)
    return _one_kernel(graph, node, [*floats, *added, *more], shapes, lie, bool(causal), facts, scale, False, blocks)


def _one_kernel(graph: GraphImporter, node: fx.Node, inputs: list[Any], shapes: list[Any], lie: list[str], causal: bool, mask: Mask, scale: Any,
                past: bool = False, blocks: Blocks | None = None, dtype: str = "float32") -> Any:
    """The result of attend_dense, turned already where it is only read so. `shapes` are those of query, key and value, [B, H, S, D]."""
    target, out = graph.parts.target, _turned(node)
    (_, heads, _, width), (_, groups, _, _), (_, _, _, value_width) = shapes
    factor = 1 / math.sqrt(width) if scale is None else float(scale)
    lies = lie[0], lie[1], lie[2], "bhsd" if out is node else "bshd"
    rows = shapes[0][2] * (heads // groups) if isinstance(shapes[0][2], int) and not causal and blocks is None else 0
    schedule = AttendDense(width, value_width, heads, groups, factor, causal, mask, lies, past, *registers(target, rows),
                           workers=target.cores, blocks=blocks, dtype=dtype)
    return _finished(graph, node, schedule, inputs, graph.shape(out), dtype)


def _finished(graph: GraphImporter, node: fx.Node, schedule: Any, inputs: list[Any], shape: list[Any], made: str = "float32") -> Any:
    """What a kernel gives in this shape, as the value of the node, and of the one that turns it."""
    out, dtype = _turned(node), str(node.meta["val"].dtype).removeprefix("torch.")
    result = graph.one_kernel(schedule, inputs, shape, made)
    if dtype != made:
        result = graph.block_builder.emit(relax.op.astype(result, dtype))
    if len(shape) == 2:
        result = graph.block_builder.emit(relax.op.reshape(result, graph.shape(out)))
    if out is not node:
        graph.env[out] = result
    return result


def _written(graph: GraphImporter, cache: Any, new: tuple[fx.Node, str], past: Any, groups: int, width: int) -> Any:
    """The cache with new rows in it."""
    held, value = graph.value(cache), graph.value(new[0])
    dtypes = [declared(one).dtype for one in (held, value)]
    if dtypes[1] not in ("float32", "bfloat16"):
        value, dtypes[1] = in_float32(graph, new[0]), "float32"
    inputs = [held, value, graph.value(past)]
    kernel = graph.kernel_of(CacheWrite(width, groups, new[1], graph.parts.target.cores, *dtypes), [*map(declared, inputs)])
    return graph.block_builder.emit(relax.op.call_tir_inplace(kernel, inputs, 0, inputs[0].ty))


def registers(target: Target, rows: int = 0) -> tuple[int, int, int]:
    """Lanes, vectors of rows, and keys together, that fill the registers of a target: sums in about half of them.

    rows   that read the same keys all, where that is known: twice as many at a time, where no more than that go empty, take fewer loads
    """
    lanes = target.vector_bytes // 4
    if target.arch != "x86_64" or (target.vector_registers >= WIDE and rows and -rows % (4 * lanes) == -rows % (2 * lanes)):
        return lanes, 4, target.vector_registers // 8
    return lanes, 2, target.vector_registers // 4


def _as_it_lies(node: fx.Node) -> tuple[fx.Node, str]:
    """The tensor before it was turned from [B, S, H, D] to [B, H, S, D], where it was."""
    return (arguments_of(node)[0], "bshd") if _turns(node) else (node, "bhsd")


def _turns(node: fx.Node) -> bool:
    """Does it exchange heads and places?"""
    return node.target is aten.transpose.int and {dim % 4 for dim in arguments_of(node)[1:]} == {1, 2}


def _turned(node: fx.Node) -> fx.Node:
    """The node that turns the result to [B, S, H, D], where it is the only one that reads it."""
    users = list(node.users)
    return users[0] if len(users) == 1 and _turns(users[0]) else node


def _mask(graph: GraphImporter, mask: fx.Node, keys: Any) -> Any:
    """The mask with four dimensions and a column for every key: the kernel broadcasts the other dimensions only."""
    sizes, added = mask.meta["val"].shape, graph.value(mask)
    if declared(added).dtype not in ("bool", "float32"):
        added = graph.block_builder.emit(relax.op.astype(added, "float32"))
    if len(sizes) == 4 and (_is_one(keys) or not _is_one(sizes[3])):
        return added
    return graph.block_builder.emit(relax.op.broadcast_to(added, [1] * (4 - len(sizes)) + graph.shape(mask)[:-1] + [graph.size(keys)]))


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _mask_of(added: Any) -> Mask:
    one = declared(added)
    assert one.dtype in ("bool", "float32"), f"a mask is {one.dtype}"
    batch, heads, queries = (size != 1 for size in one.shape[:3])
    return Mask(one.dtype, (batch, heads, queries))


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
    if node.target is aten.ge.Scalar and arguments_of(node)[1] == 0:
        return _counts(inputs[0])
    return node.target in VIEWS and _is_true(inputs[0])


def _counts(node: fx.Node) -> bool:
    """Is it made of arange from 0 on?"""
    while node.target in VIEWS:
        node = arguments_of(node)[0]
    return node.target is aten.arange.default
