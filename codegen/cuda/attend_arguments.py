"""What the attention kernels for GPUs are given, and which keys a run of a listed block of them holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c
from sparsify_compiler.codegen.cuda import tiles as t
from sparsify_compiler.codegen.cuda.attend_rows import Strided


class Given:
    """f(query [B, H, Q, D], key [B, G, K, D], value [B, G, K, E], indices, counts, tile_of, tiles, key_mask, out [B, H, Q, E], lse [B, H, Q], ...).

    Strided in all but their last dimension; the lists as ops/attend_blocks.py has them, int32; tiles uint8 [T, block_q, block_k], read where `tiled`
    is 1; key_mask uint8 [B, K], where `padded` is 1. Behind them int32 block_q, block_k, tiled, padded, causal, and `factor`, float32: the scale of
    scores in base 2.
    """

    def __init__(self, dtype: str, width: int, value_width: int, keys: int) -> None:
        self.dtype, self.width, self.value_width, self.keys = dtype, width, value_width, keys
        B, H, G, Q, K = (e.int32() for _ in range(5))
        self.B, self.H, self.G, self.Q, self.K = B, H, G, Q, K
        self.NQ, self.C, self.IB, self.IH, T = (e.int32() for _ in range(5))
        self.query = Strided("query", (B, H, Q, c.const(width)), dtype)
        self.key, self.value = Strided("key", (B, G, K, c.const(width)), dtype), Strided("value", (B, G, K, c.const(value_width)), dtype)
        self.indices = e.argument((self.IB, self.IH, self.NQ, self.C), "int32")
        self.counts = e.argument((self.IB, self.IH, self.NQ), "int32")
        self.tile_of = e.argument(tuple(e.int32() for _ in range(4)), "int32")
        self.tiles, self.key_mask = e.argument((T, e.int32(), e.int32()), "uint8"), e.argument((e.int32(), e.int32()), "uint8")
        self.out = Strided("out", (B, H, Q, c.const(value_width)), dtype)
        self.lse = e.argument((B, H, Q), "float32")

    def numbers(self) -> None:
        """The next parameters."""
        self.block_q, self.block_k, self.tiled, self.padded, self.causal = (
            c.number(name) for name in ("block_q", "block_k", "tiled", "padded", "causal"))
        self.factor = c.real("factor")
        for tensor in (self.query, self.key, self.value, self.out):
            _ = tensor.flat     # declared before there are loops

    def place(self, batch: Any, head: Any, block: Any) -> None:
        """The block works on this head, and on this block of query rows."""
        self.batch, self.head, self.block = batch, head, block
        self.group = e.let(tirx.truncdiv(head, tirx.truncdiv(self.H, self.G)))
        listed = tirx.Select(tirx.EQ(self.IH, self.H), head, tirx.Select(tirx.EQ(self.IH, self.G), self.group, c.const(0)))
        self.list_at = (e.let(e.minimum(batch, self.IB - 1)), e.let(listed), block)
        self.runs = c.ceil(self.block_k, self.keys)     # of a listed block
        self.total = e.let(e.minimum(e.load(self.counts, *self.list_at), self.C) * self.runs)

    def run(self, number: Any, first: Any, end: Any) -> tuple[Any, Any, Any, Any]:
        """Of the runs of the listed blocks, for query rows first ... end - 1: its first key, how many they are at most, its tile or -1, the key's
        column in that."""
        place, part = e.let(tirx.truncdiv(number, self.runs)), e.let(number % self.runs)
        block = e.let(e.load(self.indices, *self.list_at, place))
        start = e.let(block * self.block_k + part * self.keys)
        seen = e.either(self.causal > 0, e.minimum(self.K, end + (self.K - self.Q)), self.K)
        count = e.let(e.maximum(e.minimum(e.minimum((block + 1) * self.block_k, seen) - start, self.keys), 0))
        tile = c.registers(1, "int32")
        e.store(tile, c.const(-1), 0)
        with e.when(self.tiled > 0):
            e.store(tile, e.load(self.tile_of, *self.list_at, place), 0)
        return start, count, e.let(e.load(tile, 0)), e.let(part * self.keys)

    def copy(self, keys: t.Tile, values: t.Tile, thread: Any, threads: int, start: Any, count: Any) -> None:
        """Begin to copy a run; keys that do not count at all as zeros, whatever they hold."""
        def marked(row: Any) -> Any:
            found = c.registers(1, "int32")
            e.store(found, c.const(0), 0)
            with e.when(row < count):
                e.store(found, e.cast("int32", e.load(self.key_mask, self.batch, start + row)), 0)
            return e.let(e.load(found, 0) > 0)

        def both(there: Callable[[Any], Any]) -> None:
            for tile, source in ((keys, self.key), (values, self.value)):
                begin, step = source.index(self.batch, self.group, start), e.cast("int64", source.steps[2])
                t.copy_rows(tile, thread, threads, lambda row, chunk, begin=begin, step=step, source=source: (
                    c.address(source.flat, begin + e.cast("int64", e.either(row < count, row, 0)) * step + chunk * t.CHUNK), there(row)))

        e.choose(self.padded > 0, lambda: both(marked), lambda: both(lambda row: row < count))

    def plain(self, first: Any, start: Any, count: Any, tile: Any) -> Any:
        """Do all query rows from `first` on count all keys of a whole run?"""
        below = tirx.Or(tirx.EQ(self.causal, 0), start + count <= first + (self.K - self.Q) + 1)
        return e.let(e.both(e.both(e.both(tile < 0, tirx.EQ(self.padded, 0)), tirx.EQ(count, self.keys)), below))

    def allowed(self, row: Any, key: Any, start: Any, count: Any, tile: Any, column: Any) -> Any:
        """Does this query row count this key of the run?"""
        found = c.registers(1, "int32")
        sees = tirx.Or(tirx.EQ(self.causal, 0), start + key <= row + (self.K - self.Q))
        e.store(found, e.cast("int32", e.both(key < count, sees)), 0)
        with e.when(e.both(e.load(found, 0) > 0, tile >= 0)):
            within = e.minimum(row - self.block * self.block_q, self.block_q - 1)
            e.store(found, e.cast("int32", e.load(self.tiles, tile, within, column + key)), 0)
        with e.when(e.both(e.load(found, 0) > 0, self.padded > 0)):
            e.store(found, e.cast("int32", e.load(self.key_mask, self.batch, start + key)), 0)
        return e.let(e.load(found, 0) > 0)
