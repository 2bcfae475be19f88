"""attend_blocks for a few query rows, as in decoding: each listed key and value is read from memory once for all heads of its group.

A task is a part of the listed blocks of one group. Vectors run along the width: as many dot products of `rows` query rows with some keys are in
registers at a time as these have lanes, and are added up in a tree of shuffles. Parts are merged by the logarithms of their sums (Flash-Decoding,
Dao et al., 2023).

Bound by: the bandwidth at which the listed keys and values arrive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen import emit_tiles as t
from sparsify_compiler.codegen.kernels import softmax
from sparsify_compiler.codegen.kernels.attend_arguments import PARTS, Places, arguments, each_task
from sparsify_compiler.codegen.kernels.finish import load_part, store_part
from sparsify_compiler.codegen.vectors import AVX512, Vectors

DOT = Path(__file__).with_name("dot_bf16.ll")
KEYS = 64           # at a time
APART = KEYS + 16    # scores of a row, and room behind them
VECTORS = 4         # sums of a row's columns in registers at a time


@dataclass(frozen=True)
class AttendFew:
    """How: the dtype of query, key, value and out, and how many query rows are multiplied with a key at once (1 or 4)."""

    dtype: str
    rows: int
    cut_for: Vectors = AVX512
    name = "attend_few"

    def compute(self) -> Any:
        """The PrimFunc; its parameters are those of attend_arguments.py.

        And: heads that share a list (as many as a group has, or 1), parts of a list.
        """
        return e.function("main", lambda: _body(self), self.cut_for)

    @property
    def halves(self) -> bool:
        """Are numbers stored in 16 bits?"""
        return self.dtype == "bfloat16"

    @property
    def step(self) -> int:
        """Numbers of a vector register, as they are stored."""
        return self.cut_for.lanes * (2 if self.halves else 1)


def _body(how: AttendFew) -> None:
    a = arguments(how.dtype, "together", "parts")
    a.words = e.opaque(tirx.truncdiv(a.D + (how.step - 1), how.step) * e.lanes())       # of a packed query row
    a.columns = e.opaque(tirx.truncdiv(a.E + (how.step - 1), how.step) * how.step)  # sums of a row
    a.most = e.opaque(e.minimum(a.block_q, a.Q))                                    # query rows of a head in a block
    a.lines = e.opaque(tirx.truncdiv(a.together * a.most + (how.rows - 1), how.rows) * how.rows)
    tasks = e.opaque(tirx.truncdiv(a.B * a.H, a.together) * a.NQ * a.parts)
    counter = e.scratch(e.lanes(), "int32")
    e.store(counter, tirx.const(0, "int32"), 0)
    kept = SimpleNamespace(sums=e.scratch(tasks * a.lines * a.columns, "float32"), tops=e.scratch(tasks * a.lines, "float32"),
                           totals=e.scratch(tasks * a.lines, "float32"))
    with e.loop(a.workers, parallel=True) as _, e.llvm(e.vectors().text(*PARTS) + (DOT.read_text() if how.halves else "")):
        room = SimpleNamespace(queries=e.scratch(a.lines * a.words, "int32"), scores=e.scratch(a.lines * APART, "float32"),
                               fades=e.scratch(a.lines, "float32"))
        with each_task(a, counter, tasks) as task:
            _part(how, a, room, kept, task)
    with e.llvm(e.vectors().text(*PARTS)), e.loop(a.B * a.H) as head, e.loop(a.Q) as row:
        _merge(how, a, kept, e.opaque(head), e.opaque(row))


def _part(how: AttendFew, a: Any, room: Any, kept: Any, task: Any) -> None:
    """All rows of one block and the heads that share its list, over a part of it."""
    which = e.opaque(tirx.truncdiv(task, a.parts))
    heads = e.opaque(tirx.truncdiv(which, a.NQ))
    places = Places(a, e.opaque(heads * a.together), e.opaque(which - heads * a.NQ))
    first = e.opaque(places.block * a.block_q)
    end = e.opaque(e.minimum(first + a.block_q, a.Q))
    r = SimpleNamespace(**vars(room), first=first, rows=e.opaque(end - first), line=e.opaque(task * a.lines))
    r.used = e.opaque(a.together * r.rows)
    _pack(how, a, r, places)
    with e.loop(a.lines) as line:
        e.store(kept.tops, e.constant(-math.inf, "float32"), r.line + line)
        e.store(kept.totals, e.zero(), r.line + line)
    with e.loop(tirx.truncdiv(a.lines * a.columns, e.lanes())) as i:
        e.store(kept.sums, softmax.lanes(0.0), r.line * a.columns + i * e.lanes(), lanes=e.lanes())
    with places.each(first, end, KEYS, task - which * a.parts, a.parts) as keys:
        with e.loop(keys.count) as n:
            places.prefetch("value", keys.first + n)
        _scores(how, a, r, places, keys)
        with e.when(a.biased):
            _bias(a, r, places, keys)
        e.choose(keys.whole, lambda: None, lambda: _mask(a, r, places, keys))
        with e.when(keys.jumps), e.loop(KEYS) as n:
            places.prefetch("key", keys.upcoming + n)
        _shares(a, r, kept, keys)
        for whole in (True, False):
            with e.when(keys.whole if whole else tirx.Not(keys.whole)):
                _add(how, a, r, kept, places, keys, whole)


def _read(how: AttendFew, tensor: Any, at: Any, count: Any = None) -> Any:
    """One vector of numbers as they are stored, in words; the first `count` of them where that is given."""
    if how.halves:
        if count is not None:
            return e.let(tirx.call_extern("int32x16", "load_halves", t.address(tensor.elements, at), count))
        return e.let(e.reinterpret("int32", e.load(tensor.elements, at, lanes=2 * e.lanes()), e.lanes()))
    return e.let(load_part(tensor.elements, at, count) if count is not None else e.load(tensor.elements, at, lanes=e.lanes()))


def _pack(how: AttendFew, a: Any, r: Any, places: Places) -> None:
    """queries [line][word]: lines are the block's rows of each head; with the sign of the scale, zeros behind the width."""
    flip = e.constant(-2**31 + (2**15 if how.halves else 0), "int32")
    sign = e.let(e.broadcast(tirx.Select(a.sign < e.zero(), flip, e.constant(0, "int32")), e.lanes()))
    with e.loop(a.lines) as line, e.loop(tirx.truncdiv(a.words, e.lanes())) as i:
        head, row = _head_and_row(r, places, e.opaque(e.minimum(line, r.used - 1)))
        at = e.wide(a.query.at(places.batch, head, row) + e.cast("int64", i * how.step))
        words = _read(how, a.query, at, e.opaque(a.D - i * how.step))
        bits = words if how.halves else e.reinterpret("int32", words, e.lanes())
        e.store(r.queries, bits ^ sign, line * a.words + i * e.lanes(), lanes=e.lanes())


def _head_and_row(r: Any, places: Places, line: Any) -> tuple[Any, Any]:
    """What is in a line: the rows of the first head, those of the next, ..."""
    head = e.opaque(tirx.truncdiv(line, r.rows))
    return e.opaque(places.head + head), e.opaque(r.first + line - head * r.rows)


def _bias(a: Any, r: Any, places: Places, keys: Any) -> None:
    """Add the bias to the scores."""
    with e.loop(r.used) as line, e.loop(tirx.truncdiv(keys.count + (e.lanes() - 1), e.lanes())) as i:
        head, row = _head_and_row(r, places, e.opaque(line))
        at = e.opaque(line * APART + i * e.lanes())
        more = places.added(head, row, e.opaque(keys.first + i * e.lanes()), e.opaque(keys.count - i * e.lanes()))
        e.store(r.scores, e.load(r.scores, at, lanes=e.lanes()) + more, at, lanes=e.lanes())


def _scores(how: AttendFew, a: Any, r: Any, places: Places, keys: Any) -> None:
    """scores [line][key] = query . key."""
    across = e.lanes() // how.rows
    whole = e.opaque(tirx.truncdiv(a.D, how.step))
    with e.loop(tirx.truncdiv(keys.count + (across - 1), across)) as group, e.loop(tirx.truncdiv(a.lines, how.rows)) as some:
        first = e.opaque(group * across)
        lines = [e.opaque((some * how.rows + i) * a.words) for i in range(how.rows)]
        starts = [places.at("key", keys.first + e.minimum(first + i, keys.count - 1)) for i in range(across)]
        sums = [e.Register(e.lanes(), softmax.lanes(0.0)) for _ in range(e.lanes())]

        def step(i: Any, count: Any, lines: Any = lines, starts: Any = starts, sums: Any = sums) -> None:
            loaded = [_read(how, a.key, start + e.cast("int64", i * how.step), count) for start in starts]
            for row, line in enumerate(lines):
                query = e.let(e.load(r.queries, line + i * e.lanes(), lanes=e.lanes()))
                query = query if how.halves else e.let(e.reinterpret("float32", query, e.lanes()))
                for number, key in enumerate(loaded):
                    total = sums[row * across + number]
                    total.set(e.external(total.dtype, "dot_bf16", total.get(), key, query) if how.halves else softmax.fma(key, query, total.get()))

        with e.loop(whole) as i:
            step(i, None)
        with e.when(whole * how.step < a.D):
            step(whole, e.opaque(a.D - whole * how.step))
        found = _added([e.let(total.get()) for total in sums])
        for row in range(how.rows):
            own = e.part(found, row * across, across) if across < e.lanes() else found
            e.store(r.scores, own, (some * how.rows + row) * APART + first, lanes=across)


def _added(vectors: list[Any]) -> Any:
    """One vector of the vectors' sums."""
    while len(vectors) > 1:
        vectors = [e.let(e.shuffle(one, other, range(0, 2 * e.lanes(), 2)) + e.shuffle(one, other, range(1, 2 * e.lanes(), 2)))
                   for one, other in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def _mask(a: Any, r: Any, places: Places, keys: Any) -> None:
    """Scores of places that do not count become minus infinity."""
    with e.loop(r.used) as line, e.loop(keys.count) as n:
        _, row = _head_and_row(r, places, e.opaque(line))
        at = e.opaque(line * APART + n)
        counts = places.allowed(keys, n, row, 1)
        e.store(r.scores, tirx.Select(counts, e.load(r.scores, at), e.constant(-math.inf, "float32")), at)


def _shares(a: Any, r: Any, kept: Any, keys: Any) -> None:
    """Scores become shares, 2 ** (score - largest so far), absent where a place does not count; fades are by how much that grew."""
    none = softmax.lanes(-math.inf)
    with e.loop(a.lines) as line:
        start = e.opaque(line * APART)
        e.store(r.scores, none, start + keys.count, lanes=e.lanes())     # behind the last key nothing counts
        vectors = e.opaque(tirx.truncdiv(keys.count + (e.lanes() - 1), e.lanes()))
        tops = e.Register(e.lanes(), none)
        with e.loop(vectors) as i:
            tops.set(softmax.larger(e.load(r.scores, start + i * e.lanes(), lanes=e.lanes()), tops.get()))
        before = e.let(e.broadcast(e.load(kept.tops, r.line + line), e.lanes()))
        top = softmax.larger(before, e.let(e.broadcast(e.external("float32", "largest", tops.get()), e.lanes())))
        offset = e.let(softmax.finite_top(top) * e.broadcast(-a.scale, e.lanes()))
        fade = softmax.exp2(e.let(before * e.broadcast(a.scale, e.lanes()) + offset))
        totals = e.Register(e.lanes(), softmax.lanes(0.0))
        with e.loop(vectors) as i:
            score = e.let(e.load(r.scores, start + i * e.lanes(), lanes=e.lanes()))
            share = softmax.exp2(softmax.fma(score, e.broadcast(a.scale, e.lanes()), offset))
            totals.set(totals.get() + share)
            e.store(r.scores, tirx.Select(tirx.EQ(score, none), softmax.lanes(-0.0), share), start + i * e.lanes(), lanes=e.lanes())
        e.store(kept.totals, e.load(kept.totals, r.line + line) * e.lane(fade, 0) + e.external("float32", "sum", totals.get()), r.line + line)
        e.store(kept.tops, e.lane(top, 0), r.line + line)
        e.store(r.fades, e.lane(fade, 0), line)


def _add(how: AttendFew, a: Any, r: Any, kept: Any, places: Places, keys: Any, whole: bool) -> None:
    """sums [line][column] = sums * fade + shares * values; of bfloat16 the even columns of a vector before its odd ones."""
    loads = VECTORS // (2 if how.halves else 1)
    every = e.opaque(tirx.truncdiv(a.E, loads * how.step))
    rest = e.opaque(tirx.truncdiv(a.columns, how.step) - every * loads)

    def columns(first: Any, loads: int, lines: Any, count: Any) -> None:
        width = loads * how.step // e.lanes()
        places_of = [e.opaque((r.line + line) * a.columns + first) for line in lines]
        fades = [e.let(e.broadcast(e.load(r.fades, line), e.lanes())) for line in lines]
        sums = [[e.Register(e.lanes(), e.load(kept.sums, at + v * e.lanes(), lanes=e.lanes()) * fade) for v in range(width)]
                for at, fade in zip(places_of, fades, strict=True)]
        with e.loop(keys.count) as n:
            at = e.wide(places.at("value", keys.first + n) + e.cast("int64", first))
            words = [_read(how, a.value, at + i * how.step, count) for i in range(loads)]
            values = [value for word in words for value in (e.upcast_pairs(word, e.lanes()) if how.halves else [word])]
            values = [e.let(value) for value in values]
            for line, registers in zip(lines, sums, strict=True):
                share = e.let(e.broadcast(e.load(r.scores, line * APART + n), e.lanes()))
                for register, value in zip(registers, values, strict=True):
                    total = softmax.fma(value, share, register.get())
                    register.set(total if whole else tirx.Select(softmax.counted(share), total, register.get()))
        for at, registers in zip(places_of, sums, strict=True):
            for v, register in enumerate(registers):
                e.store(kept.sums, register.get(), at + v * e.lanes(), lanes=e.lanes())

    with e.loop(tirx.truncdiv(a.lines, how.rows)) as some:
        lines = [e.opaque(some * how.rows + i) for i in range(how.rows)]
        with e.loop(every) as chunk:
            columns(e.opaque(chunk * (loads * how.step)), loads, lines, None)
        with e.loop(rest) as chunk:
            first = e.opaque((every * loads + chunk) * how.step)
            columns(first, 1, lines, e.opaque(a.E - first))


def _merge(how: AttendFew, a: Any, kept: Any, head: Any, row: Any) -> None:
    """out and lse of one row, from its parts."""
    batch, heads, block = (e.opaque(value) for value in (tirx.truncdiv(head, a.H), tirx.truncdiv(head, a.together), tirx.truncdiv(row, a.block_q)))
    rows = e.opaque(e.minimum(a.block_q, a.Q - block * a.block_q))
    line = e.opaque((head - heads * a.together) * rows + row - block * a.block_q)
    start = e.opaque((heads * a.NQ + block) * a.parts * a.lines + line)
    top, total = e.Register(e.lanes(), softmax.lanes(-math.inf)), e.Register(e.lanes(), softmax.lanes(0.0))
    with e.loop(a.parts) as part:
        top.set(softmax.larger(e.let(e.broadcast(e.load(kept.tops, start + part * a.lines), e.lanes())), top.get()))
    scale = e.let(e.broadcast(a.scale, e.lanes()))
    offset = e.let(softmax.finite_top(top.get()) * e.broadcast(-a.scale, e.lanes()))

    def weight(part: Any) -> Any:
        return softmax.exp2(softmax.fma(e.let(e.broadcast(e.load(kept.tops, start + part * a.lines), e.lanes())), scale, offset))

    with e.loop(a.parts) as part:
        total.set(total.get() + weight(part) * e.broadcast(e.load(kept.totals, start + part * a.lines), e.lanes()))
    none = tirx.EQ(top.get(), softmax.lanes(-math.inf))
    lse = e.let((top.get() * scale + softmax.log2(e.let(total.get()))) * softmax.lanes(math.log(2)))
    inner = e.opaque(head - batch * a.H)
    e.store(a.lse, e.lane(softmax.unless_nan(e.let(total.get()), tirx.Select(none, top.get(), lse)), 0), batch, inner, row)
    inverse = softmax.unless_nan(e.let(total.get()), tirx.Select(none, softmax.lanes(0.0), softmax.lanes(1.0) / total.get()))
    to = a.out.at(batch, inner, row)
    with e.loop(tirx.truncdiv(a.columns, how.step)) as chunk:
        sums = [e.Register(e.lanes(), softmax.lanes(0.0)) for _ in range(how.step // e.lanes())]
        with e.loop(a.parts) as part:
            at, by = e.opaque((start + part * a.lines) * a.columns + chunk * how.step), weight(part)
            for v, register in enumerate(sums):
                register.multiply_add(e.load(kept.sums, at + v * e.lanes(), lanes=e.lanes()), by)
        finished = [e.let(register.get() * inverse) for register in sums]
        place, count = e.wide(to + e.cast("int64", chunk * how.step)), e.opaque(a.E - chunk * how.step)
        if how.halves:
            e.builder.evaluate(tirx.call_extern("int32", "store_halves", t.address(a.out.elements, place), t.bfloat16_pairs(*finished), count))
        else:
            store_part(a.out.elements, finished[0], place, count)
