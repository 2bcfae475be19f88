"""The blocks that an attention of a graph reads: by a table of patterns, or by one that a kernel makes of the queries and keys at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import fx

from sparsify_compiler.codegen.kernels.blocks_dense import Blocks
from sparsify_compiler.codegen.kernels.mask_dense import Mask
from sparsify_compiler.codegen.kernels.score_blocks import ScoreBlocks
from sparsify_compiler.codegen.vectors import vectors_of
from sparsify_compiler.ops.attend_blocks import EXTENT

if TYPE_CHECKING:
    from sparsify_compiler.codegen.whole_graph_import import GraphImporter

NO_MASK = Mask()


@dataclass(frozen=True)
class Read:
    """What is attended: float32 values of queries and keys and how they lie, the sizes of both, the mask and the tokens before, where there are."""

    query: Any
    key: Any
    lie: tuple[str, str]
    shapes: tuple[Any, Any]
    scale: float | None
    causal: bool
    mask: tuple[Any, ...] = ()
    facts: Mask = NO_MASK
    past: tuple[Any, ...] = ()


def blocks_of(graph: GraphImporter, node: fx.Node, starts: str, read: Read) -> tuple[Blocks | None, list[Any]]:
    """What attend_dense and attend_step are told of blocks, and the table and tiles that they are given; None for all keys.

    Behind the first seven arguments of the node: table, tiles, EXTENT numbers; shares, least, logs, way, page, before, text where scores choose too.
    """
    if len(node.args) == 7:
        return None, []
    of_blocks: Any = node.args[7:]
    table, tiles, *more = of_blocks
    batch, heads = (size != 1 for size in table.meta["val"].shape[:2])
    blocks, found = Blocks(more[0], more[1], batch, heads, starts, more[2], more[3]), [graph.value(table), graph.value(tiles)]
    if len(more) == EXTENT:
        return blocks, found
    (way, page, before), state = more[EXTENT + 3 : EXTENT + 6], [graph.value(one) for one in more[EXTENT : EXTENT + 3]]
    blocks = replace(blocks, batch=True, heads=True, starts=starts if before else "", own=True, before=before, by_head=heads)
    (batches, number, queries, width), (_, groups, _, _) = read.shapes
    factor = 1 / math.sqrt(width) if read.scale is None else float(read.scale)
    schedule = ScoreBlocks(width, number, groups, factor, read.causal or starts == "last", way, page, starts, read.facts if starts else NO_MASK,
                           read.lie, bool(read.past), blocks, graph.parts.target.cores, vectors_of(graph.parts.target))
    inputs = [read.query, read.key, *(read.mask if starts else ()), *read.past, *state, *found]
    keys = list(read.key.ty.shape)[2 if read.lie[1] == "bhsd" else 1]
    shape = [graph.size(batches), number, _up(graph.size(queries) - 1, blocks.queries) + 1, _up(keys, blocks.keys)]
    return blocks, [graph.one_kernel(schedule, inputs, shape, "int32"), found[1], *([found[0]] if blocks.starts else [])]


def _up(count: Any, size: int) -> Any:
    """How many of this size, of a number or an expression."""
    return (count + (size - 1)) // size
