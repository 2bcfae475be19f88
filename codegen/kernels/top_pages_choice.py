"""What each head reads of the blocks whose pages have scores: the second half of top_pages.

Scores of blocks are made of those of their pages; the least score that is taken is found by halving, 32 steps over the bits of numbers that are
ordered as scores are; what a head or a pattern reads is listed.

Bound by: the instructions of the list, one block after the other.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels import softmax

INFINITE, LEAST = 0x7F800000, -(2**31)
UNSEEN = -0x7F800000  # of minus infinity, as _ordered has it


def choose(a: Any, scores: Any, head: Any) -> None:
    """The list of one head."""
    batch = e.opaque(tirx.truncdiv(head, a.H))
    c = SimpleNamespace(batch=batch, own=e.opaque(head - batch * a.H), order=e.scratch(a.wide, "int32"), seen=e.stack(1, "int32"))
    c.kinds = e.opaque(e.minimum(batch, a.KB - 1)), e.opaque(e.minimum(c.own, a.KH - 1))
    c.least = e.opaque(e.load(a.least, c.own))
    e.store(c.seen, tirx.const(0, "int32"), 0)
    with e.when(c.least >= 0):
        with e.loop(tirx.truncdiv(a.wide, e.lanes())) as i:
            e.store(c.order, _ordered(_block_scores(a, scores, head, e.opaque(i * e.lanes()))), i * e.lanes(), lanes=e.lanes())
        with e.loop(a.wide - a.NK) as i:
            e.store(c.order, tirx.const(LEAST, "int32"), a.NK + i)
        with e.loop(a.NK) as block:
            seen = e.let(e.load(c.order, block) > UNSEEN)
            e.store(c.seen, e.load(c.seen, 0) + e.cast("int32", seen), 0)
            with e.when(e.both(seen, e.load(a.kinds, *c.kinds, block) > tirx.const(1, "int8"))):
                e.store(c.order, tirx.const(INFINITE, "int32"), block)
    share = e.let(e.cast("float32", e.load(c.seen, 0)) * e.load(a.shares, c.own))
    wanted = e.opaque(e.maximum(e.cast("int32", tirx.ceil(e.let(share - e.constant(1e-6, "float32")))), c.least))
    least = _least(a, c, wanted)
    _list(a, c, least, e.opaque(wanted - _how_many(a, c, e.opaque(least + 1))))


def _block_scores(a: Any, scores: Any, head: Any, first: Any) -> Any:
    """Of as many blocks as a vector has lanes: the log of the sum of exp of the scores of their pages; infinite where it is no number."""
    def page(number: Any) -> Any:
        return e.let(e.load(scores, (head * a.split + number) * a.wide + first, lanes=e.lanes()))

    top, total = e.Register(e.lanes(), softmax.lanes(-math.inf)), e.Register(e.lanes(), softmax.lanes(0.0))
    with e.loop(a.split) as number:
        top.set(softmax.larger(page(number), top.get()))
    base = softmax.finite_top(top.get())
    to_two = softmax.lanes(math.log2(math.e))
    with e.loop(a.split) as number:
        score = page(number)
        power = softmax.exp2(e.let((score - base) * to_two))
        total.set(total.get() + tirx.Select(tirx.EQ(score, softmax.lanes(-math.inf)), softmax.lanes(0.0), power))
    log = e.let(softmax.log2(e.let(total.get())) * softmax.lanes(math.log(2)))
    value = e.Register(e.lanes(), tirx.Select(tirx.EQ(top.get(), softmax.lanes(-math.inf)), top.get(), base + log))
    with e.when(tirx.EQ(a.split, 1)):
        value.set(page(tirx.const(0, "int32")))
    value.set(softmax.unless_nan(e.let(total.get()), e.let(value.get())))
    with e.when(a.cut), e.loop(e.minimum(a.NK - first, e.lanes())) as i:
        e.store(value.buffer, e.load(value.buffer, i) + e.load(a.open_share, first + i), i)
    return value.get()


def _ordered(score: Any) -> Any:
    """int32 that are ordered as scores are; plus infinity for what is no number, 0 for minus zero too."""
    bits = e.let(e.reinterpret("int32", score, e.lanes()))

    def every(value: int) -> Any:
        return e.broadcast(tirx.const(value, "int32"), e.lanes())

    size = e.let(bits & every(0x7FFFFFFF))
    signed = e.let(tirx.Select(bits < every(0), every(0) - size, bits))
    return e.let(tirx.Select(size > every(INFINITE), every(INFINITE), signed))


def _how_many(a: Any, c: Any, least: Any) -> Any:
    """Blocks whose score is at least this."""
    total = e.Register(e.lanes(), e.broadcast(tirx.const(0, "int32"), e.lanes()), "int32")
    limit = e.let(e.broadcast(least, e.lanes()))
    with e.loop(tirx.truncdiv(a.wide, e.lanes())) as i:
        at_least = e.load(c.order, i * e.lanes(), lanes=e.lanes()) >= limit
        total.set(total.get() + e.cast_to("int32", at_least, e.lanes()))
    cell = e.stack(1, "int32")
    e.store(cell, tirx.const(0, "int32"), 0)
    with e.loop(e.lanes()) as i:
        e.store(cell, e.load(cell, 0) + e.load(total.buffer, i), 0)
    return e.let(e.load(cell, 0))


def _least(a: Any, c: Any, wanted: Any) -> Any:
    """The score of the wanted-th block; that of the last which is seen where there are fewer."""
    low, high = e.stack(1, "int32"), e.stack(1, "int32")  # as many have at least `low`, fewer have `high`
    e.store(low, tirx.const(UNSEEN + 1, "int32"), 0)
    e.store(high, tirx.const(INFINITE + 1, "int32"), 0)
    steps = e.opaque(e.either(c.least >= 0, 32, 0))
    with e.loop(steps) as _, e.when(e.load(high, 0) - 1 > e.load(low, 0)):
        sides = [e.cast("int64", e.load(side, 0)) for side in (low, high)]
        middle = e.opaque(e.cast("int32", (sides[0] + sides[1]) >> tirx.const(1, "int64")))
        e.choose(_how_many(a, c, middle) >= wanted, lambda: e.store(low, middle, 0), lambda: e.store(high, middle, 0))
    return e.opaque(e.load(low, 0))


def _list(a: Any, c: Any, least: Any, ties: Any) -> None:
    """indices, counts and tiles of what is above the least score, so many of those that have it, and what the pattern reads."""
    number, equal = e.stack(1, "int32"), e.stack(1, "int32")
    e.store(number, tirx.const(0, "int32"), 0)
    e.store(equal, tirx.const(0, "int32"), 0)
    with e.loop(a.NK) as block:
        chosen = e.stack(1, "int32")
        e.store(chosen, tirx.const(0, "int32"), 0)
        with e.when(c.least >= 0):
            score = e.let(e.load(c.order, block))
            tie = e.let(e.cast("int32", tirx.EQ(score, least)))
            e.store(equal, e.load(equal, 0) + tie, 0)
            first = tirx.And(tie > 0, tirx.Or(e.load(equal, 0) <= ties, tirx.EQ(score, INFINITE)))
            e.store(chosen, e.cast("int32", tirx.Or(score > least, first)), 0)
        kind = e.let(e.cast("int32", e.load(a.kinds, *c.kinds, block)))
        at = e.opaque(e.load(number, 0))
        e.store(a.indices, block, c.batch, c.own, at)
        with e.when(a.tiled):
            some = tirx.And(tirx.EQ(kind, 1), tirx.EQ(e.load(chosen, 0), 0))
            tile = e.load(a.tiles, e.minimum(c.batch, a.TB - 1), e.minimum(c.own, a.TH - 1), block)
            e.store(a.tile_of, tirx.Select(some, tile, tirx.const(-1, "int32")), c.batch, c.own, at)
        e.store(number, at + (e.load(chosen, 0) | e.cast("int32", kind > 0)), 0)
    e.store(a.counts, e.load(number, 0), c.batch, c.own)
    with e.loop(a.NK - e.load(number, 0)) as i:
        e.store(a.indices, tirx.const(0, "int32"), c.batch, c.own, e.load(number, 0) + i)
        with e.when(a.tiled):
            e.store(a.tile_of, tirx.const(0, "int32"), c.batch, c.own, e.load(number, 0) + i)
