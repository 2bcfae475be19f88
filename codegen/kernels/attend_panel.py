"""attend_blocks in float32 for many query rows: vectors run along query rows, so that keys and values are read as they lie in memory.

A worker takes a block of query rows, `vectors` registers at a time, and packs them transposed and scaled. For 64 keys at a time it makes their
scores, [key][row], takes powers of two against the largest so far (Milakov and Gimelshein, arXiv:1805.02867), and adds shares * values to sums
[column][row] (Dao et al., FlashAttention, arXiv:2205.14135). Keys and values are broadcast from memory, or taken from lanes: each of their numbers is
multiplied with `vectors` registers of rows.

Bound by: the FMA rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels import softmax
from sparsify_compiler.codegen.kernels.attend_arguments import PARTS, Places, arguments, each_rows
from sparsify_compiler.codegen.kernels.finish import load_part, store_part
from sparsify_compiler.codegen.vectors import AVX512, Vectors

KEYS = 64       # at a time: their scores, and the packed queries, stay in L1
ROOM = 16       # behind them: groups may reach over the last
# By lanes and vectors: keys, or columns, whose sums are in registers at a time; the second for what is left.
GROUPS = {16: {4: (6, 4), 2: (10, 4)}, 8: {4: (2, 2), 2: (5, 2)}, 4: {4: (4, 4), 2: (8, 4)}}


@dataclass(frozen=True)
class AttendPanel:
    """How: this many registers of query rows at a time, 2 or 4."""

    vectors: int
    cut_for: Vectors = AVX512
    name = "attend_panel"

    def compute(self) -> Any:
        """The PrimFunc; its parameters are those of attend_arguments.py."""
        return e.function("main", lambda: _body(self), self.cut_for)

    @property
    def rows(self) -> int:
        """Query rows at a time."""
        return self.vectors * self.cut_for.lanes


def _body(how: AttendPanel) -> None:
    a = arguments("float32")
    counter = e.scratch(e.lanes(), "int32")
    e.store(counter, tirx.const(0, "int32"), 0)
    with e.loop(a.workers, parallel=True) as _, e.llvm(e.vectors().text(*PARTS)):
        room = SimpleNamespace(queries=e.scratch(a.D * how.rows, "float32"), scores=e.scratch((KEYS + ROOM) * how.rows, "float32"),
                               sums=e.scratch((a.E + 2 * ROOM) * how.rows, "float32"),
                               bias=e.scratch(e.lanes() * e.lanes(), "float32"),
                               **{name: e.scratch(how.rows, "float32") for name in ("top", "total", "fade")})
        with each_rows(a, counter, how.rows) as (places, first, end):
            _rows(how, a, room, places, first, end)


def _rows(how: AttendPanel, a: Any, room: Any, places: Places, first: Any, end: Any) -> None:
    """Everything for the query rows first ... end - 1."""
    _pack(how, a, room, places, first, end)
    begin(room, how.vectors, a.E)
    with places.each(first, end, KEYS) as keys:
        _scores(how, a, room, places, keys)
        with e.when(a.biased):
            add_bias(how, a, room, places, keys, first, end)
        e.choose(keys.whole, lambda: None, lambda: mask(how, a, room, places, keys, first))
        e.choose(keys.plain, lambda: _shares(how, a, room, places, keys, True), lambda: _shares(how, a, room, places, keys, False))
        e.choose(_plain(a, places, keys), lambda: _add(how, a, room, places, keys, True), lambda: _add(how, a, room, places, keys, False))
    _write(how, a, room, places, first, end)


def begin(room: Any, vectors: int, columns: Any) -> None:
    """No key was seen: of so many vectors of rows, nothing is summed in any column."""
    for v in range(vectors):
        e.store(room.top, softmax.lanes(-math.inf), v * e.lanes(), lanes=e.lanes())
        e.store(room.total, softmax.lanes(0.0), v * e.lanes(), lanes=e.lanes())
    with e.loop(columns * vectors) as i:
        e.store(room.sums, softmax.lanes(0.0), i * e.lanes(), lanes=e.lanes())


def _pack(how: AttendPanel, a: Any, room: Any, places: Places, first: Any, end: Any) -> None:
    """queries [column][row], scaled. Rows past the last repeat it: their results are not stored."""
    chunks = e.opaque(tirx.truncdiv(a.D, e.lanes()))
    with e.loop(how.vectors) as v:
        starts = [places.at("query", e.minimum(first + v * e.lanes() + i, end - 1)) for i in range(e.lanes())]
        with e.loop(chunks) as chunk:
            lines = [e.let(e.load(a.query.elements, start + chunk * e.lanes(), lanes=e.lanes())) for start in starts]
            to = e.opaque(chunk * e.lanes() * how.rows + v * e.lanes())
            for d, line in enumerate(e.transpose(lines)):
                e.store(room.queries, line * e.broadcast(a.sign, e.lanes()), to + d * how.rows, lanes=e.lanes())
        with e.loop(a.D - chunks * e.lanes()) as rest:
            for i, start in enumerate(starts):
                column = chunks * e.lanes() + rest
                e.store(room.queries, e.load(a.query.elements, start + column) * a.sign, column * how.rows + v * e.lanes() + i)


def _grouped(how: AttendPanel, count: Any, body: Callable[[Any, int], None]) -> None:
    """body(first, size) for groups that cover 0 ... count - 1; the last may reach behind it."""
    large, small = GROUPS[e.lanes()][how.vectors]
    whole = e.opaque(tirx.truncdiv(count, large))
    with e.loop(whole) as number:
        body(e.opaque(number * large), large)
    with e.loop(tirx.truncdiv(count - whole * large + (small - 1), small)) as number:
        body(e.opaque(whole * large + number * small), small)


def _products(how: AttendPanel, sums: list[list[e.Register]], count: Any, left: Any, right: Callable[[Any, int], Any], whole: bool = True,
              several: Callable[[Any], Callable[[int, int], Any]] | None = None, steps: int = 1) -> None:
    """sums[g][v] += left[i][v] * right(i, g), a scalar, for i < count; where not `whole`, absent shares of `left` add nothing.

    several   where factors are lanes of registers: of the `steps` from i on, factor(step, g)
    """
    def add(i: Any, factor_of: Callable[[int], Any]) -> None:
        rows = [e.let(e.load(left, i * how.rows + v * e.lanes(), lanes=e.lanes())) for v in range(how.vectors)]
        counts = [None if whole else softmax.counted(row) for row in rows]
        for g, registers in enumerate(sums):
            factor = e.let(e.broadcast(factor_of(g), e.lanes()))
            for register, row, counted in zip(registers, rows, counts, strict=True):
                total = softmax.fma(row, factor, register.get())
                register.set(total if counted is None else tirx.Select(counted, total, register.get()))

    done: Any = 0
    if several is not None:
        blocks = e.opaque(tirx.truncdiv(count, steps))
        with e.loop(blocks) as block:
            factor = several(block * steps)
            for step in range(steps):
                add(block * steps + step, lambda g, step=step, factor=factor: factor(step, g))
        done = blocks * steps
    with e.loop(count, start=done) as i:
        add(i, lambda g: right(i, g))


def _scores(how: AttendPanel, a: Any, room: Any, places: Places, keys: Any) -> None:
    """scores [key][row], and their maximum with the largest so far into `fade`."""
    for v in range(how.vectors):
        e.store(room.fade, e.load(room.top, v * e.lanes(), lanes=e.lanes()), v * e.lanes(), lanes=e.lanes())

    def group(first: Any, size: int) -> None:
        starts = [places.at("key", keys.first + e.minimum(first + g, keys.count - 1)) for g in range(size)]
        for g in range(size):
            places.prefetch("value", keys.first + first + g)
        sums = [[e.Register(e.lanes(), softmax.lanes(0.0)) for _ in range(how.vectors)] for _ in range(size)]

        def ahead(i: Any) -> Callable[[int, int], Any]:
            """Four numbers of each key."""
            held = [e.let(e.load(a.key.elements, start + e.cast("int64", i), lanes=e.lanes())) for start in starts]
            return lambda step, g: e.lane(held[g], step)

        more = {"several": ahead, "steps": e.lanes()} if e.vectors().by_element else {}
        _products(how, sums, a.D, room.queries, lambda i, g: e.load(a.key.elements, starts[g] + i), **more)
        for v in range(how.vectors):
            top = e.let(e.load(room.fade, v * e.lanes(), lanes=e.lanes()))
            for g, registers in enumerate(sums):
                value = e.let(registers[v].get())
                e.store(room.scores, value, (first + g) * how.rows + v * e.lanes(), lanes=e.lanes())
                top = softmax.larger(top, value)
            e.store(room.fade, top, v * e.lanes(), lanes=e.lanes())

    _grouped(how, keys.count, group)


def add_bias(how: Any, a: Any, room: Any, places: Places, keys: Any, first: Any, end: Any) -> None:
    """Scores [key][row] with their bias, which lies as [row][key]: 16 by 16 at a time. The maximum is taken anew."""
    with e.loop(how.vectors) as v:
        e.store(room.fade, e.load(room.top, v * e.lanes(), lanes=e.lanes()), v * e.lanes(), lanes=e.lanes())
        with e.loop(tirx.truncdiv(keys.count + (e.lanes() - 1), e.lanes())) as chunk:
            n = e.opaque(chunk * e.lanes())
            with e.loop(e.lanes()) as i:
                row = e.opaque(e.minimum(first + v * e.lanes() + i, end - 1))
                e.store(room.bias, places.added(places.head, row, e.opaque(keys.first + n), e.opaque(keys.count - n)), i * e.lanes(), lanes=e.lanes())
            for i, line in enumerate(e.transpose([e.let(e.load(room.bias, i * e.lanes(), lanes=e.lanes())) for i in range(e.lanes())])):
                at = e.let((n + i) * how.rows + v * e.lanes())
                e.store(room.scores, e.load(room.scores, at, lanes=e.lanes()) + line, at, lanes=e.lanes())
        with e.loop(keys.count) as n:
            score = e.let(e.load(room.scores, n * how.rows + v * e.lanes(), lanes=e.lanes()))
            e.store(room.fade, softmax.larger(e.load(room.fade, v * e.lanes(), lanes=e.lanes()), score), v * e.lanes(), lanes=e.lanes())


def mask(how: Any, a: Any, room: Any, places: Places, keys: Any, first: Any, until: Any = None) -> None:
    """Scores of places that do not count become minus infinity, those of all keys up to `until` among them; the maximum is taken anew."""
    with e.loop(how.vectors) as v:
        e.store(room.fade, e.load(room.top, v * e.lanes(), lanes=e.lanes()), v * e.lanes(), lanes=e.lanes())
    if until is not None:
        with e.loop(until * how.vectors, start=keys.count * how.vectors) as i:
            e.store(room.scores, softmax.lanes(-math.inf), i * e.lanes(), lanes=e.lanes())
    with e.loop(keys.count) as n, e.loop(how.vectors) as v:
        at = e.let(n * how.rows + v * e.lanes())
        allowed = places.allowed(keys, n, e.opaque(first + v * e.lanes()))
        score = e.let(tirx.Select(allowed, e.load(room.scores, at, lanes=e.lanes()), softmax.lanes(-math.inf)))
        e.store(room.scores, score, at, lanes=e.lanes())
        e.store(room.fade, softmax.larger(e.load(room.fade, v * e.lanes(), lanes=e.lanes()), score), v * e.lanes(), lanes=e.lanes())


def _shares(how: AttendPanel, a: Any, room: Any, places: Places, keys: Any, whole: bool) -> None:
    """Scores become shares, 2 ** (score - largest so far); what was summed before fades by the growth of that."""
    tops, totals, scale = [], [], e.let(e.broadcast(a.scale, e.lanes()))
    for v in range(how.vectors):
        top, before = (e.let(e.load(held, v * e.lanes(), lanes=e.lanes())) for held in (room.fade, room.top))
        tops.append(e.let(softmax.finite_top(top) * e.broadcast(-a.scale, e.lanes())))
        fade = softmax.exp2(e.let(before * e.broadcast(a.scale, e.lanes()) + tops[v]))
        e.store(room.top, top, v * e.lanes(), lanes=e.lanes())
        e.store(room.fade, fade, v * e.lanes(), lanes=e.lanes())
        e.store(room.total, e.load(room.total, v * e.lanes(), lanes=e.lanes()) * fade, v * e.lanes(), lanes=e.lanes())
        totals.append(e.Register(e.lanes(), softmax.lanes(0.0)))    # of these keys: added one by one to all others they would lose digits
    with e.loop(keys.count) as n:
        places.prefetch("key", keys.upcoming + n)
        for v in range(how.vectors):
            at = e.let(n * how.rows + v * e.lanes())
            score = e.let(e.load(room.scores, at, lanes=e.lanes()))
            share = softmax.exp2(softmax.fma(score, scale, tops[v]))
            totals[v].set(totals[v].get() + share)
            if not whole:
                share = tirx.Select(tirx.EQ(score, softmax.lanes(-math.inf)), softmax.lanes(-0.0), share)
            e.store(room.scores, share, at, lanes=e.lanes())
    for v, total in enumerate(totals):
        e.store(room.total, e.load(room.total, v * e.lanes(), lanes=e.lanes()) + total.get(), v * e.lanes(), lanes=e.lanes())


def _plain(a: Any, places: Places, keys: Any) -> Any:
    """Do all places count, or do those that don't have finite values, which a share of 0 makes 0?"""
    bad = e.Register(1, e.constant(0, "int32"), "int32")
    with e.when(tirx.Not(keys.whole)), e.loop(keys.count) as n, e.loop(tirx.truncdiv(a.E + (e.lanes() - 1), e.lanes())) as i:
        at = places.at("value", keys.first + n) + e.cast("int64", i * e.lanes())
        bad.set(bad.get() | e.external("int32", "bad_words", e.let(load_part(a.value.elements, e.wide(at), e.opaque(a.E - i * e.lanes())))))
    return tirx.EQ(bad.get(), 0)


def _add(how: AttendPanel, a: Any, room: Any, places: Places, keys: Any, whole: bool) -> None:
    """sums [column][row] = sums * fade + shares * values."""
    base = places.at("value", keys.first)
    step, width = e.scalar(e.cast("int64", a.value.strides[2])), e.lanes()

    def group(first: Any, size: int) -> None:
        columns = [e.scalar(base + e.cast("int64", e.minimum(first + g, a.E - 1))) for g in range(size)]
        fades = [e.let(e.load(room.fade, v * e.lanes(), lanes=e.lanes())) for v in range(how.vectors)]
        sums = [[e.Register(width, e.load(room.sums, (first + g) * how.rows + v * width, lanes=width) * fades[v]) for v in range(how.vectors)]
                for g in range(size)]

        def ahead(i: Any) -> Callable[[int, int], Any]:
            """These columns of a value, which are neighbours."""
            at = columns[0] + e.cast("int64", i) * step
            held = [e.let(e.load(a.value.elements, at + v, lanes=e.lanes())) for v in range(0, size, e.lanes())]
            return lambda _, g: e.lane(held[g // e.lanes()], g % e.lanes())

        def scalars(several: Any = None) -> None:
            def one(i: Any, g: int) -> Any:
                return e.load(a.value.elements, columns[g] + e.cast("int64", i) * step)

            _products(how, sums, keys.count, room.scores, one, whole, several)

        if e.vectors().by_element:
            e.choose(first + size <= a.E, lambda: scalars(ahead), scalars)
        else:
            scalars()
        for g, registers in enumerate(sums):
            for v, register in enumerate(registers):
                e.store(room.sums, register.get(), (first + g) * how.rows + v * e.lanes(), lanes=e.lanes())

    _grouped(how, a.E, group)


def _write(how: AttendPanel, a: Any, room: Any, places: Places, first: Any, end: Any) -> None:
    """out [row][column] = sums / total, and lse."""
    with e.loop(how.vectors) as v:
        row = e.opaque(first + v * e.lanes())
        part = places.finish(*(e.let(e.load(held, v * e.lanes(), lanes=e.lanes())) for held in (room.top, room.total)), row, e.opaque(end - row))
        starts = [places.at("out", e.minimum(row + i, end - 1)) for i in range(e.lanes())]
        with e.loop(tirx.truncdiv(a.E + (e.lanes() - 1), e.lanes())) as chunk:
            column = e.opaque(chunk * e.lanes())
            held = e.opaque(column * how.rows + v * e.lanes())
            lines = e.transpose([e.let(e.load(room.sums, held + i * how.rows, lanes=e.lanes()) * part) for i in range(e.lanes())])
            for i, line in enumerate(lines):
                with e.when(row + i < end):
                    store_part(a.out.elements, line, starts[i] + e.cast("int64", column), e.opaque(a.E - column))
