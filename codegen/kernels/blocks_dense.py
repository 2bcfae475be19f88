"""Blocks of attend_dense.py: which keys a block of queries reads, by a table that is for texts of any length up to its own.

The table [B or 1, H or 1, NQ, NK] int32 says of queries and keys by their places in the text, so that it is the same in a prompt and in every step of
decoding: -2 where a query block reads nothing of a key block, -1 where it reads all of it, else the tile that says which places count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.mask_dense import add_rows, truths

NONE = -2
FEW = 8         # queries of a step of decoding, at most (Indexer.is_dense)


@dataclass(frozen=True)
class Blocks:
    """How: queries and keys of a block; whether the table varies along batch and heads.

    starts       where places are counted from: "" the first key, "first" or "last" the first key that this row of the mask lets through
    dense_below  keys below which all are read; and for at most FEW queries
    """

    queries: int
    keys: int
    batch: bool
    heads: bool
    starts: str
    dense_below: int
    dense_below_decoding: int

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
    t.shift = _first_key(how, a, t)
    which = e.opaque(tirx.truncdiv(number, parts))
    row = e.opaque(e.floordiv(a.past - t.shift, size) + which)
    t.block_start = e.opaque(t.shift + row * size)
    first, end = e.opaque(e.maximum(t.block_start, a.past)), e.opaque(e.minimum(t.block_start + size, a.past + a.Q))
    t.start, t.each = e.opaque(first - a.past), e.opaque(e.maximum(end - first, 1))
    t.lines, t.first = e.opaque((end - first) * heads), e.opaque((number - which * parts) * how.rows)
    t.row = e.opaque(e.minimum(e.maximum(row, 0), a.table.shape[2] - 1))     # rows before the text are of padding: nobody reads them
    with e.when(t.first < t.lines):
        yield


def _first_key(how: Any, a: Any, t: Any) -> Any:
    """Where the text of this batch begins."""
    if not how.blocks.starts:
        return e.constant(0, "int32")
    row = e.constant(0, "int32") if how.blocks.starts == "first" else e.opaque(a.Q - 1)
    found = e.stack(1, "int32")
    e.store(found, a.K, 0)
    with e.loop(a.K) as key:
        counts = e.load(a.mask, t.batch if how.mask.varies[0] else 0, 0, row, key)
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

            read(first, stop, more)


def _cut(how: Any, a: Any, t: Any, tile: Any, first: Any) -> None:
    """Hide the places of these keys that the tile leaves out."""
    def line(_: Any, query: Any) -> Any:
        return e.opaque(e.maximum(a.past + query - t.block_start, 0))

    local = e.opaque(t.key - first)
    add_rows(how, t, line, lambda row, at, lanes: truths(e.let(e.load(a.tiles, tile, row, local + at, lanes=lanes)), lanes))
