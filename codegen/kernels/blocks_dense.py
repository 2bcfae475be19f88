"""Blocks of attend_dense.py: which keys a block of queries reads, by a table that is for texts of any length up to its own.

The table [B or 1, H or 1, NQ, NK] int32 says of queries and keys by their places in the text, so that it is the same in a prompt and in every step of
decoding: -2 where a query block reads nothing of a key block, -1 where it reads all of it, else the tile that says which places count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.mask_dense import add_rows, truths

NONE, WHOLE, PLACES = -2, -1, -3     # PLACES: what the patterns of a table of its own say of each place
FEW = 8         # queries of a step of decoding, at most (Indexer.is_dense)


@dataclass(frozen=True)
class Blocks:
    """How: queries and keys of a block; whether the table varies along batch and heads.

    starts       where places are counted from: "" the first key, "first" or "last" the first key that this row of the mask lets through
    dense_below  keys below which all are read; and for at most FEW queries
    own          the table is of the queries of this call, by blocks from the first key on: its first line is of the block that the first of them is
                 in. `starts` then says where places are counted from in patterns, which come behind the tiles: [1, 1 or H, NQ, NK] from `before`
                 places ahead of a text on, by head or not
    """

    queries: int
    keys: int
    batch: bool
    heads: bool
    starts: str
    dense_below: int
    dense_below_decoding: int
    own: bool = False
    before: int = 0
    by_head: bool = False

    @property
    def sometimes_dense(self) -> bool:
        """Are there lengths at which all keys are read?"""
        return max(self.dense_below, self.dense_below_decoding) > 1


def below(how: Blocks, a: Any) -> Any:
    """Is this call so short that all keys are read?"""
    return a.keys < e.either(a.Q <= FEW, e.constant(how.dense_below_decoding, "int32"), e.constant(how.dense_below, "int32"))


def parts_of_blocks(how: Any, a: Any) -> Any:
    """Tasks of a batch and head, or group: as many query blocks as these queries can fall into, and parts of their rows."""
    return e.opaque(_blocks(how, a) * _parts(how, a))


def _blocks(how: Any, a: Any) -> Any:
    return tirx.truncdiv(a.Q + (how.blocks.queries - 2), how.blocks.queries) + 1


def _parts(how: Any, a: Any) -> Any:
    heads = 1 if how.blocks.heads else how.heads // how.groups
    return tirx.truncdiv(e.minimum(a.Q, how.blocks.queries) * heads + (how.rows - 1), how.rows)


@contextmanager
def part_of_blocks(how: Any, a: Any, t: Any, number: Any, heads: int) -> Iterator[None]:
    """The rows of a task, all of one query block; nothing is done where it has none."""
    parts, size = e.opaque(_parts(how, a)), how.blocks.queries
    t.text = first_key(how.blocks.starts, how.mask, a, t.batch)
    t.shift = e.constant(0, "int32") if how.blocks.own else t.text
    which = e.opaque(tirx.truncdiv(number, parts))
    row = e.opaque(e.floordiv(a.past - t.shift, size) + which)
    t.block_start = e.opaque(t.shift + row * size)
    first, end = e.opaque(e.maximum(t.block_start, a.past)), e.opaque(e.minimum(t.block_start + size, a.past + a.Q))
    t.start, t.each = e.opaque(first - a.past), e.opaque(e.maximum(end - first, 1))
    t.lines, t.first = e.opaque((end - first) * heads), e.opaque((number - which * parts) * how.rows)
    line = which if how.blocks.own else e.maximum(row, 0)
    t.row = e.opaque(e.minimum(line, a.table.shape[2] - 1))     # rows before the text are of padding: nobody reads them
    with e.when(t.first < t.lines):
        yield


def first_key(starts: str, mask: Any, a: Any, batch: Any) -> Any:
    """Where the text of this batch begins, by a row of the mask."""
    if not starts:
        return e.constant(0, "int32")
    row = e.constant(0, "int32") if starts == "first" else e.opaque(a.Q - 1)
    found = e.stack(1, "int32")
    e.store(found, a.K, 0)
    with e.loop(a.K) as key:
        counts = e.load(a.mask, batch if mask.varies[0] else 0, 0, row, key)
        e.store(found, e.minimum(e.load(found, 0), tirx.Select(counts, key, a.K)), 0)
    return e.opaque(e.either(tirx.EQ(e.load(found, 0), a.K), e.constant(0, "int32"), e.load(found, 0)))


def each_block(how: Any, a: Any, t: Any, last: Callable[[], Any], read: Callable[..., None]) -> None:
    """read(first, end, more) for every block of keys that the task's query block reads."""
    size, end = how.blocks.keys, last()
    columns = e.opaque(e.minimum(tirx.truncdiv(end - t.shift + (size - 1), size), a.table.shape[3]))
    with e.loop(columns) as column:
        kind = e.opaque(e.load(a.table, t.batch if how.blocks.batch else 0, t.head if how.blocks.heads else 0, t.row, column))
        with e.when(tirx.NE(kind, NONE)):
            first = e.opaque(t.shift + column * size)
            stop = e.opaque(e.minimum(first + size, end))

            def more() -> None:
                with e.when(kind >= 0):
                    _cut(how, a, t, kind, first)
                if how.blocks.own and how.blocks.starts:
                    with e.when(tirx.EQ(kind, PLACES)):
                        _cut_places(how, a, t)

            read(first, stop, more)


def _cut(how: Any, a: Any, t: Any, tile: Any, first: Any) -> None:
    """Hide the places of these keys that the tile leaves out."""
    def line(_: Any, query: Any) -> Any:
        return e.opaque(e.maximum(a.past + query - t.block_start, 0))

    local = e.opaque(t.key - first)
    add_rows(how, t, line, lambda row, at, lanes: truths(e.let(e.load(a.tiles, tile, row, local + at, lanes=lanes)), lanes))


def _cut_places(how: Any, a: Any, t: Any) -> None:
    """Hide the places of these keys that the patterns leave out."""
    with e.loop(how.rows) as i:
        head, query = t.line(i)
        row = e.opaque(e.maximum(a.past + query - t.text + how.blocks.before, 0))
        with e.loop(t.count) as k:
            column = e.opaque(e.maximum(t.key + k - t.text + how.blocks.before, 0))
            with e.when(tirx.Not(allowed(how.blocks, a, head if how.blocks.by_head else 0, row, column))):
                e.store(t.scores, e.constant(-math.inf, "float32"), k * how.rows + i)


def allowed(blocks: Blocks, a: Any, head: Any, row: Any, column: Any) -> Any:
    """Do the patterns let a place count, of a query and a key from `before` places ahead of the text on?"""
    line, block = (e.opaque(tirx.truncdiv(place, size)) for place, size in ((row, blocks.queries), (column, blocks.keys)))
    kind = e.opaque(e.load(a.patterns, 0, head, e.minimum(line, a.patterns.shape[2] - 1), e.minimum(block, a.patterns.shape[3] - 1)))
    inside = e.load(a.tiles, e.maximum(kind, 0), row - line * blocks.queries, column - block * blocks.keys)
    return tirx.Or(tirx.EQ(kind, WHOLE), e.both(kind >= 0, inside))
