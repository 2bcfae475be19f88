"""Extremes and where they stand, of what may be no number: operators that whole graphs take from the kernel that sorts, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from tvm import relax

from sparsify_compiler.codegen.kernels.top_rows import TopRows
from sparsify_compiler.codegen.whole_graph_functions import Parameter, arguments_of, declared
from sparsify_compiler.errors import KernelError

if TYPE_CHECKING:
    from sparsify_compiler.codegen.whole_graph_import import GraphImporter


def top_rows(graph: GraphImporter, value: Any, shape: list[Any], largest: bool) -> tuple[Any, Any]:
    """As many of the largest or least numbers of each row of float32 as the shape has in its last dimension, in order, and where they stand."""
    known = tuple(size if isinstance(size, int) else None for size in shape)
    kernel = graph.kernel_of(TopRows(largest, graph.parts.target.cores), [declared(value), Parameter(known, "float32"), Parameter(known, "int64")])
    found = graph.block_builder.emit(relax.call_tir(kernel, [value], out_ty=[relax.TensorType(shape, dtype) for dtype in ("float32", "int64")]))
    first, second = (graph.block_builder.emit(relax.TupleGetItem(found, i)) for i in range(2))
    return first, second


def best(largest: bool) -> Callable[[GraphImporter, fx.Node], Any]:
    """The largest or least number of each row and where it stands, or where alone: what is no number comes first, which TVM's own never see."""
    def convert(graph: GraphImporter, node: fx.Node) -> Any:
        x, dim, _ = arguments_of(node)
        seen, wanted = x.meta["val"], node.meta["val"]
        if not seen.is_floating_point():
            return graph.plain(node)
        if dim not in (None, -1, seen.dim() - 1):
            raise KernelError("whole graphs find the place of an extreme along the last dimension", where=node.name,
                              hint="save() keeps the model for PyTorch")
        rows: list[Any] = [1, -1] if dim is None or seen.dim() == 0 else graph.shape(x)
        value = graph.block_builder.emit(relax.op.astype(_shaped(graph, graph.value(x), rows), "float32"))
        value = value if largest else graph.block_builder.emit(relax.op.negative(value))
        parts = list(top_rows(graph, value, [*list(value.ty.shape)[:-1], 1], True))
        if isinstance(wanted, torch.Tensor):
            return _shaped(graph, parts[1], graph.shape(node))
        parts[0] = parts[0] if largest else graph.block_builder.emit(relax.op.negative(parts[0]))
        shaped = [_shaped(graph, part, [graph.size(size) for size in wanted[0].shape]) for part in parts]
        return graph.block_builder.emit(relax.op.astype(shaped[0], str(wanted[0].dtype).removeprefix("torch."))), shaped[1]

    return convert


def lossy(graph: GraphImporter, node: fx.Node) -> Any:
    """Raises KernelError: nobody gets numbers where torch says that there are none."""
    raise KernelError(f"whole graphs lose what is no number in {node.target}", where=node.name, hint="save() keeps the model for PyTorch")


def _shaped(graph: GraphImporter, value: Any, shape: list[Any]) -> Any:
    return graph.block_builder.emit(relax.op.reshape(value, shape))
