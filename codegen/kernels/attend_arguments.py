"""What the kernels of attend_blocks are given, and what they have in common: strided tensors, sizes, which places of two blocks count."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen import emit_tiles as t
from sparsify_compiler.codegen.kernels import softmax

MOST = 2.0**20      # what a finite bias is at most, scaled: a row whose keys all have the least number, as masks do, would lose all digits
PARTS = ("attend", "part", "scalar")   # what the kernels call


@dataclass(frozen=True)
class Strided:
    """A tensor of four dimensions whose last is contiguous: its elements as a flat buffer, its sizes, its strides."""

    elements: Any
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]

    def at(self, *index: Any) -> Any:
        """Where the last dimension begins, as an index of 64 bits."""
        steps = (e.cast("int64", i) * e.cast("int64", stride) for i, stride in zip(index, self.strides, strict=False))
        return e.scalar(sum(steps, start=tirx.const(0, "int64")))


def parameter(shape: tuple[Any, ...], dtype: str) -> tuple[Any, tuple[Any, ...]]:
    """The next parameter, and its strides."""
    strides = tuple(e.int32() for _ in shape[:-1])
    return e.builder.match_buffer(e.builder.arg("", e.builder.handle()), shape, dtype, strides=[*strides, tirx.const(1, "int32")],
                                  align=2 if "16" in dtype else 4), strides


def strided(buffer: Any, strides: tuple[Any, ...]) -> Strided:
    size, dtype = e.cast("int64", buffer.shape[0]) * e.cast("int64", strides[0]), str(buffer.dtype)
    return Strided(e.builder.decl_buffer((size,), dtype, data=buffer.data, align=2 if "16" in dtype else 4), tuple(buffer.shape), strides)


def arguments(dtype: str, *more: str) -> Any:
    """f(query, key, value, indices, counts, tile_of, tiles, key_mask, out, lse, block_q, block_k, tiled, padded, causal, workers, *more,
    bias, bias_batch, bias_head, bias_row, bias_key, bias_size, scale).

    query [B, H, Q, D], key [B, G, K, D], value [B, G, K, E], out [B, H, Q, E], strided; the index tensors as attend_blocks has them, contiguous,
    with tiles turned: uint8 [T, block_k, block_q and as many as make a multiple of 64]; tile_of and tiles are read where `tiled` is 1, key_mask,
    uint8 [B, K], where `padded` is 1. bias is the address of what is added to the scores in base e, or 0; four strides in bytes, and the bytes of a
    number: 4 of float32, 2 of bfloat16. scale is that of scores in base 2; `more` are int32.
    """
    a = SimpleNamespace(**{name: e.int32() for name in ("B", "H", "G", "Q", "K", "D", "E", "NQ", "C", "T", "IB", "IH")})
    given = [parameter(shape, dtype) for shape in ((a.B, a.H, a.Q, a.D), (a.B, a.G, a.K, a.D), (a.B, a.G, a.K, a.E))]
    a.indices, a.counts = e.argument((a.IB, a.IH, a.NQ, a.C), "int32"), e.argument((a.IB, a.IH, a.NQ), "int32")
    a.tile_of = e.argument(tuple(e.int32() for _ in range(4)), "int32")
    a.tiles, a.key_mask = e.argument((a.T, e.int32(), e.int32()), "uint8"), e.argument((e.int32(), e.int32()), "uint8")
    given.append(parameter((a.B, a.H, a.Q, a.E), dtype))
    a.lse = e.argument((a.B, a.H, a.Q), "float32")
    for name in ("block_q", "block_k", "tiled", "padded", "causal", "workers", *more):
        setattr(a, name, e.builder.arg(name, e.int32()))
    for name in ("bias", "bias_batch", "bias_head", "bias_row", "bias_key"):
        setattr(a, name, e.builder.arg(name, e.builder.int64()))
    a.bias_size = e.builder.arg("bias_size", e.builder.int32())
    a.scale = e.builder.arg("scale", e.builder.float32())
    a.sign = e.let(tirx.Select(a.scale < e.zero(), e.constant(-1.0, "float32"), e.constant(1.0, "float32")))
    a.scale = e.let(a.scale * a.sign)
    a.biased = e.let(tirx.NE(a.bias, tirx.const(0, "int64")))
    a.bias_scale = e.let(e.constant(math.log2(math.e), "float32") / a.scale)    # of scores before they are scaled
    a.bias_limit = e.let(e.constant(MOST, "float32") / a.scale)
    a.query, a.key, a.value, a.out = (strided(*one) for one in given)
    return a


@contextmanager
def each_task(a: Any, counter: Any, total: Any, at: int = 0) -> Iterator[Any]:
    """`with each_task(...) as task:` the tasks 0 ... total - 1, each taken by whichever worker is free."""
    mine = e.stack(1, "int32")

    def take() -> None:
        e.store(mine, tirx.call_extern("int32", "next_task", t.address(counter, at)), 0)

    take()
    with e.builder.While(e.load(mine, 0) < total):
        yield e.opaque(e.load(mine, 0))
        take()


class Places:
    """Where a block of query rows of one head, numbered through the batch, finds what it reads, and which of it counts."""

    def __init__(self, a: Any, head: Any, block: Any) -> None:
        self.a, self.block = a, block
        self.batch = e.opaque(tirx.truncdiv(head, a.H))
        self.head = e.opaque(head - self.batch * a.H)
        self.group = e.opaque(tirx.truncdiv(self.head, tirx.truncdiv(a.H, a.G)))
        self.listed_batch = e.opaque(e.minimum(self.batch, a.IB - 1))
        own = tirx.Select(tirx.EQ(a.IH, a.H), self.head, tirx.Select(tirx.EQ(a.IH, a.G), self.group, 0))
        self.listed_head = e.opaque(own)
        self.bases = {name: getattr(a, name).at(self.batch, self.head if name in ("query", "out") else self.group)
                      for name in ("query", "key", "value", "out")}

    def at(self, name: str, number: Any) -> Any:
        """Index of the first element of a query or output row, a key or a value."""
        return e.scalar(self.bases[name] + e.cast("int64", number) * e.cast("int64", getattr(self.a, name).strides[2]))

    @contextmanager
    def each(self, first: Any, end: Any, most: int, part: Any = 0, parts: Any = 1, whole_steps: int = 1) -> Iterator[Any]:
        """`with places.each(...) as keys:` runs of at most this many keys that the query rows first ... end - 1 read; or a part of the listed blocks.

        first, count   of the keys;  tile: -1, or of the block;  column: of the first key in its tile
        upcoming       where the next run begins;  jumps: not behind this one, where the processor would look ahead by itself
        whole          do all of their places count, and are they a multiple of `whole_steps`, a power of two?
        plain          and is there no bias, which may be minus infinity?
        """
        a, at = self.a, (self.listed_batch, self.listed_head, self.block)
        seen = e.opaque(e.either(a.causal > 0, e.minimum(a.K, e.maximum(end + (a.K - a.Q), 0)), a.K))  # keys that the last row sees
        all_see = e.opaque(e.either(a.causal > 0, first + (a.K - a.Q) + 1, a.K))
        listed = e.opaque(e.minimum(e.load(a.counts, *at), a.C))
        begin, stop = (e.opaque(tirx.truncdiv(listed * (part + i), parts)) for i in range(2))
        with e.loop(stop, start=begin) as place:
            start = e.opaque(e.load(a.indices, *at, place) * a.block_k)
            tile = e.stack(1, "int32")
            e.store(tile, tirx.const(-1, "int32"), 0)
            with e.when(a.tiled > 0):
                e.store(tile, e.minimum(e.load(a.tile_of, *at, place), a.T - 1), 0)
            stop = e.opaque(e.either(start < 0, start, e.minimum(start + a.block_k, seen)))
            with e.loop(tirx.truncdiv(e.maximum(stop - start, 0) + (most - 1), most)) as run:
                begin = e.opaque(start + run * most)
                count = e.opaque(e.minimum(stop - begin, most))
                number = e.let(e.load(tile, 0))
                full = e.stack(1, "int32")
                e.store(full, e.cast("int32", e.both(e.both(number < 0, begin + count <= all_see), tirx.EQ(count & (whole_steps - 1), 0))), 0)
                with e.when(a.padded > 0), e.loop(count) as n:
                    e.store(full, e.load(full, 0) & e.cast("int32", e.load(a.key_mask, self.batch, begin + n)), 0)
                after = e.opaque(e.load(a.indices, *at, e.minimum(place + 1, listed - 1)) * a.block_k)
                upcoming = e.opaque(e.either(begin + most < stop, begin + most, e.either(after < 0, begin, after)))
                whole = e.let(e.load(full, 0) > 0)
                yield SimpleNamespace(first=begin, count=count, tile=number, column=e.opaque(begin - start), whole=whole,
                                      plain=e.let(e.both(whole, tirx.Not(a.biased))), upcoming=upcoming, jumps=tirx.NE(upcoming, begin + count))

    def prefetch(self, name: str, number: Any) -> None:
        """Ask for a key or a value, which is needed soon, from memory."""
        a, tensor = self.a, getattr(self.a, name)
        size = 2 if "16" in str(tensor.elements.dtype) else 4
        at = self.at(name, e.minimum(number, a.K - 1))
        with e.loop(tirx.truncdiv(tensor.shape[-1] * size + 63, 64)) as line:
            t.prefetch(tensor.elements, at + e.cast("int64", line * (64 // size)), near=False)

    def allowed(self, keys: Any, n: Any, row: Any, lanes: int = 0) -> Any:
        """Do the rows from `row` on count key number n of a run? Rows past the block may get any answer."""
        a, number, lanes = self.a, e.let(keys.first + n), lanes or e.lanes()
        flags = e.Register(lanes, _every(1, lanes), "int32")
        with e.when(a.causal > 0):
            place = row + (a.K - a.Q)
            position = tirx.Ramp(place, tirx.const(1, "int32"), lanes) if lanes > 1 else place
            flags.set(tirx.Select(position >= e.broadcast(number, lanes), _every(1, lanes), _every(0, lanes)))
        with e.when(keys.tile >= 0):
            within = e.let(row - self.block * a.block_q)
            at = (keys.tile, keys.column + n, within)
            words = tirx.call_extern(f"int32x{lanes}", "flags", t.address(a.tiles, *at)) if lanes > 1 else e.cast("int32", e.load(a.tiles, *at))
            flags.set(flags.get() & words)
        with e.when(a.padded > 0):
            flags.set(flags.get() & e.broadcast(e.cast("int32", e.load(a.key_mask, self.batch, number)), lanes))
        return flags.get() > _every(0, lanes)

    def added(self, head: Any, row: Any, number: Any, count: Any) -> Any:
        """The bias of a query row of a head for 16 keys from `number` on, the first `count` of them, as it is added to scores not scaled yet."""
        a = self.a
        steps = ((self.batch, a.bias_batch), (head, a.bias_head), (row, a.bias_row), (number, a.bias_key))
        address = e.scalar(sum((e.cast("int64", i) * step for i, step in steps), start=a.bias))
        return e.let(tirx.call_extern(e.floats(e.lanes()), "load_bias", address, a.bias_key, a.bias_size, a.bias_scale, a.bias_limit, count))

    def finish(self, top: Any, total: Any, row: Any, count: Any) -> Any:
        """Store the log of the sum of the first `count` of 16 rows, of their largest scores and the totals of their shares; 1 / total, or 0."""
        none = tirx.EQ(top, softmax.lanes(-math.inf))
        found = e.let((top * e.broadcast(self.a.scale, e.lanes()) + softmax.log2(total)) * softmax.lanes(math.log(2)))
        to = t.address(self.a.lse, self.batch, self.head, row)
        lse = softmax.unless_nan(total, tirx.Select(none, top, found))    # where all scores are NaN none is the largest
        e.builder.evaluate(tirx.call_extern("int32", "store_part", to, lse, count))
        return softmax.unless_nan(total, tirx.Select(none, softmax.lanes(0.0), softmax.lanes(1.0) / total))


def _every(value: int, lanes: int) -> Any:
    return e.broadcast(tirx.const(value, "int32"), lanes)


@contextmanager
def each_rows(a: Any, counter: Any, rows: int, at: int = 0) -> Iterator[tuple[Places, Any, Any]]:
    """`with each_rows(...) as (places, first, end):` the query rows first ... end - 1, so many at most, of the blocks that a worker takes."""
    parts = e.opaque(tirx.truncdiv(a.block_q + (rows - 1), rows))
    with each_task(a, counter, a.B * a.H * a.NQ, at) as task:
        head = e.opaque(tirx.truncdiv(task, a.NQ))
        block = e.opaque(a.NQ - 1 - (task - head * a.NQ))  # where causal, the longest first
        places = Places(a, head, block)
        with e.loop(parts) as part:
            first = e.opaque(block * a.block_q + part * rows)
            end = e.opaque(e.minimum(e.minimum(first + rows, (block + 1) * a.block_q), a.Q))
            with e.when(first < end):
                yield places, first, end
