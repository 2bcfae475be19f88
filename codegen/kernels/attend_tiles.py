"""attend_blocks in bfloat16 for many query rows, on AMX tiles: scores and sums are made transposed, [key][row] and [column][row].

Keys are tiles as they lie in memory; queries are packed in pairs of the width, once for a block of them. Values are turned into tiles of
[column][key]: once for all heads and query blocks, or, where those read little of them, run by run of keys. Scores go through L1 to the vector
units, which make shares of them, pairs of keys in bfloat16, against a maximum that is renewed only where it grew by 8 powers of two.

A value that is infinite or no number counts as 0 in the tiles, and is then added to the rows that read it.

Bound by: the vector units, which make the shares, at widths to 64; the tile unit and its loads at 128.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen import emit_tiles as t
from sparsify_compiler.codegen.kernels import softmax
from sparsify_compiler.codegen.kernels.attend_arguments import PARTS, Places, arguments, each_rows, each_task
from sparsify_compiler.codegen.kernels.attend_panel import add_bias, begin, mask
from sparsify_compiler.codegen.kernels.attend_values import DEPTH, TILE, bad, pack_step, spoil
from sparsify_compiler.codegen.kernels.softmax import LANES

KEYS = 64           # of a run
STEPS = KEYS // DEPTH
HALF = 2 * LANES    # query rows of two tiles
GROWTH = 8.0        # powers of two


@dataclass(frozen=True)
class AttendTiles:
    """How: up to 64 query rows at a time."""

    name = "attend_tiles"
    vectors = 4
    rows = 4 * LANES

    def compute(self) -> Any:
        """The PrimFunc; its parameters are those of attend_arguments.py. And: are values packed once (1) or run by run (0)?

        The width of query and key is a multiple of 32.
        """
        return e.function("main", lambda: _body(self))


def _body(how: AttendTiles) -> None:
    a = arguments("bfloat16", "once")
    a.steps = e.opaque(tirx.truncdiv(a.K + (DEPTH - 1), DEPTH))
    a.wide = e.opaque(tirx.truncdiv(a.E + (DEPTH - 1), DEPTH) * DEPTH)
    counters = e.scratch(2 * LANES, "int32")
    for i in range(2):
        e.store(counters, tirx.const(0, "int32"), i * LANES)
    held = e.opaque(e.either(a.once > 0, a.B * a.G * a.steps, a.workers * STEPS))
    values = SimpleNamespace(packed=e.scratch(held * a.wide * DEPTH, "uint16"), bad=e.scratch(held, "int32"))
    text = e.vectors().text(*PARTS)
    with e.when(a.once > 0), e.loop(a.workers, parallel=True) as _, e.llvm(text), each_task(a, counters, a.B * a.G * a.steps) as task:
        group = e.opaque(tirx.truncdiv(task, a.steps))
        places = Places(a, e.opaque(group * tirx.truncdiv(a.H, a.G)), e.constant(0, "int32"))
        pack_step(a, values, places, e.opaque((task - group * a.steps) * DEPTH), task)
    with e.loop(a.workers, parallel=True) as me, e.llvm(text):
        room = SimpleNamespace(queries=e.scratch(tirx.truncdiv(a.D, 2) * how.rows, "int32"), scores=e.scratch(KEYS * how.rows, "float32"),
                               shares=e.scratch(KEYS // 2 * how.rows, "int32"), sums=e.scratch(a.wide * how.rows, "float32"),
                               tail=e.scratch(a.D * DEPTH, "uint16"), bias=e.scratch(LANES * LANES, "float32"), values=values, me=me,
                               **{name: e.scratch(how.rows, "float32") for name in ("top", "total", "fade")})
        t.configure([t.ROWS] * 8)
        with each_rows(a, counters, how.rows, LANES) as (places, first, end):
            _rows(how, a, room, places, first, end)
        t.release()


def _rows(how: AttendTiles, a: Any, room: Any, places: Places, first: Any, end: Any) -> None:
    """Everything for the query rows first ... end - 1."""
    _pack(how, a, room, places, first, end)
    begin(room, how.vectors, a.wide)
    halves = e.opaque(tirx.truncdiv(end - first + (HALF - 1), HALF))
    with places.each(first, end, KEYS, whole_steps=DEPTH) as keys:
        steps = e.opaque(tirx.truncdiv(keys.count + (DEPTH - 1), DEPTH))
        base = e.opaque(e.either(a.once > 0, tirx.truncdiv(places.head, tirx.truncdiv(a.H, a.G)), 0))
        base = e.opaque(e.either(a.once > 0, (places.batch * a.G + base) * a.steps + tirx.truncdiv(keys.first, DEPTH), room.me * STEPS))
        with e.when(tirx.EQ(a.once, 0)), e.loop(steps) as step:
            pack_step(a, room.values, places, e.opaque(keys.first + step * DEPTH), e.opaque(base + step))
        with e.loop(halves) as half, e.loop(steps) as step:
            _scores(how, a, room, places, e.opaque(half * HALF), keys, step)
        with e.when(a.biased):
            add_bias(how, a, room, places, keys, first, end)
        e.choose(keys.whole, lambda: None, lambda: mask(how, a, room, places, keys, first, steps * DEPTH))
        with e.when(keys.jumps), e.loop(KEYS) as n:
            places.prefetch("key", keys.upcoming + n)
        with e.loop(halves) as half:
            row = e.opaque(half * HALF)
            _grow(how, a, room, row, steps)
            for whole in (True, False):
                with e.when(keys.plain if whole else tirx.Not(keys.plain)):
                    _shares(how, a, room, row, steps, whole)
            _add(how, a, room, row, steps, base)
        with e.when(bad(room.values, base, steps)):
            spoil(how, a, room, places, keys)
    _write(how, a, room, places, first, end)


def _pack(how: AttendTiles, a: Any, room: Any, places: Places, first: Any, end: Any) -> None:
    """queries [pair of the width][row], with the sign of the scale. Rows past the last repeat it: their results are not stored."""
    flip = e.let(tirx.Select(a.sign < e.zero(), e.constant(-2**31 + 2**15, "int32"), e.constant(0, "int32")))
    with e.loop(how.vectors) as v, e.loop(tirx.truncdiv(a.D, DEPTH)) as chunk:
        starts = [places.at("query", e.minimum(first + v * LANES + i, end - 1)) for i in range(LANES)]
        lines = [e.let(e.reinterpret("int32", e.load(a.query.elements, start + e.cast("int64", chunk * DEPTH), lanes=DEPTH), LANES))
                 for start in starts]
        to = e.opaque(chunk * LANES * how.rows + v * LANES)
        for pair, line in enumerate(e.transpose(lines)):
            e.store(room.queries, line ^ e.broadcast(flip, LANES), to + pair * how.rows, lanes=LANES)


def _scores(how: AttendTiles, a: Any, room: Any, places: Places, row: Any, keys: Any, step: Any) -> None:
    """scores [key][row] of 32 keys and 32 rows: tiles 0 to 3 are sums, 4 and 5 keys, 6 and 7 queries."""
    first = e.opaque(keys.first + step * DEPTH)
    stride = e.cast("int64", a.key.strides[2])

    def multiply(buffer: Any, start: Any, apart: Any) -> None:
        for i in range(4):
            t.zero(i)
        with e.loop(tirx.truncdiv(a.D, DEPTH)) as chunk:
            for i in range(2):
                t.load(4 + i, buffer, start + i * LANES * apart + e.cast("int64", chunk * DEPTH), stride=apart * 2)
                t.load(6 + i, room.queries, chunk * LANES * how.rows + row + i * LANES, stride=how.rows * 4)
            for i in range(4):
                t.multiply_add(i, 4 + i // 2, 6 + i % 2)

    def aside() -> None:
        with e.loop(DEPTH) as n:
            start = places.at("key", e.minimum(first + n, a.K - 1))
            with e.loop(tirx.truncdiv(a.D, DEPTH)) as chunk:
                words = e.reinterpret("uint16", e.load(a.key.elements, start + e.cast("int64", chunk * DEPTH), lanes=DEPTH), DEPTH)
                e.store(room.tail, words, n * a.D + chunk * DEPTH, lanes=DEPTH)
        multiply(room.tail, tirx.const(0, "int64"), e.cast("int64", a.D))

    e.choose(first + DEPTH <= a.K, lambda: multiply(a.key.elements, places.at("key", first), stride), aside)
    for i in range(4):
        t.store(i, room.scores, (step * DEPTH + i // 2 * LANES) * how.rows + row + i % 2 * LANES, stride=how.rows * 4)


def _grow(how: AttendTiles, a: Any, room: Any, row: Any, steps: Any) -> None:
    """The maximum of scores that shares are taken against; where it must grow, what was summed before fades."""
    tops = [[e.Register(LANES, e.load(room.top, row + v * LANES, lanes=LANES)) for _ in range(2)] for v in range(2)]
    with e.loop(steps * (DEPTH // 2)) as pair:
        for v in range(2):
            for i in range(2):
                score = e.load(room.scores, (pair * 2 + i) * how.rows + row + v * LANES, lanes=LANES)
                tops[v][i].set(softmax.larger(tops[v][i].get(), score))
    scale = e.let(e.broadcast(a.scale, LANES))
    for v in range(2):
        at = e.opaque(row + v * LANES)
        before = e.let(e.load(room.top, at, lanes=LANES))
        top = softmax.larger(tops[v][0].get(), tops[v][1].get())
        grown = e.external("int32", "any_above", e.let((top - before) * scale), e.constant(GROWTH, "float32"))
        with e.when(grown > 0):
            fade = softmax.exp2(e.let((before - softmax.finite_top(top)) * scale))
            e.store(room.top, top, at, lanes=LANES)
            e.store(room.total, e.load(room.total, at, lanes=LANES) * fade, at, lanes=LANES)
            with e.loop(a.wide) as column:
                place = e.let(column * how.rows + at)
                e.store(room.sums, e.load(room.sums, place, lanes=LANES) * fade, place, lanes=LANES)


def _shares(how: AttendTiles, a: Any, room: Any, row: Any, steps: Any, whole: bool) -> None:
    """shares [pair of keys][row], 2 ** (score - maximum) in bfloat16, and their sums in float32."""
    scale = e.let(e.broadcast(a.scale, LANES))
    offsets = [e.let(softmax.finite_top(e.load(room.top, row + v * LANES, lanes=LANES)) * e.broadcast(-a.scale, LANES)) for v in range(2)]
    totals = [[e.Register(LANES, softmax.lanes(0.0)) for _ in range(2)] for _ in range(2)]
    with e.loop(steps * (DEPTH // 2)) as pair:
        for v in range(2):
            shares = []
            for i in range(2):
                score = e.let(e.load(room.scores, (pair * 2 + i) * how.rows + row + v * LANES, lanes=LANES))
                share = softmax.exp2(softmax.fma(score, scale, offsets[v]), rough=True)
                totals[v][i].set(totals[v][i].get() + share)
                shares.append(share if whole else e.let(tirx.Select(tirx.EQ(score, softmax.lanes(-math.inf)), softmax.lanes(-0.0), share)))
            e.store(room.shares, t.bfloat16_pairs(*shares), pair * how.rows + row + v * LANES, lanes=LANES)
    for v in range(2):
        at = e.opaque(row + v * LANES)
        e.store(room.total, e.load(room.total, at, lanes=LANES) + totals[v][0].get() + totals[v][1].get(), at, lanes=LANES)


def _add(how: AttendTiles, a: Any, room: Any, row: Any, steps: Any, base: Any) -> None:
    """sums [column][row] += values * shares, 32 columns and 32 rows at a time."""
    with e.loop(tirx.truncdiv(a.wide, DEPTH)) as pair:
        places = [e.opaque((pair * DEPTH + i // 2 * LANES) * how.rows + row + i % 2 * LANES) for i in range(4)]
        for i in range(4):
            t.load(i, room.sums, places[i], stride=how.rows * 4)
        with e.loop(steps) as step:
            for i in range(2):
                t.load(4 + i, room.values.packed, (base + step) * a.wide * DEPTH + (pair * 2 + i) * TILE)
                t.load(6 + i, room.shares, step * LANES * how.rows + row + i * LANES, stride=how.rows * 4)
            for i in range(4):
                t.multiply_add(i, 4 + i // 2, 6 + i % 2)
        for i in range(4):
            t.store(i, room.sums, places[i], stride=how.rows * 4)


def _write(how: AttendTiles, a: Any, room: Any, places: Places, first: Any, end: Any) -> None:
    """out [row][column] = sums / total, and lse."""
    with e.loop(how.vectors) as v:
        row = e.opaque(first + v * LANES)
        part = places.finish(*(e.let(e.load(held, v * LANES, lanes=LANES)) for held in (room.top, room.total)), row, e.opaque(end - row))
        with e.loop(tirx.truncdiv(a.wide, DEPTH)) as chunk:
            column = e.opaque(chunk * DEPTH)
            lines = [e.transpose([e.let(e.load(room.sums, (column + side * LANES + i) * how.rows + v * LANES, lanes=LANES) * part)
                                  for i in range(LANES)]) for side in range(2)]
            for i, (one, other) in enumerate(zip(*lines, strict=True)):
                with e.when(row + i < end):
                    at = e.wide(places.at("out", row + i) + e.cast("int64", column))
                    words = t.bfloat16_row(one, other)
                    e.builder.evaluate(tirx.call_extern("int32", "store_halves", t.address(a.out.elements, at), words, e.opaque(a.E - column)))
