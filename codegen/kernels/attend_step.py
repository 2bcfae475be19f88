"""softmax(q kᵀ scale) v of one new token over a cache, in float32, on any processor: a step of decoding in one graph.

attend_dense.py lays rows along vectors, of which a step has a handful; here keys lie along them for scores, and columns for values. A key is read
from memory once for all heads that share it. The keys are cut into parts, as many for any number of threads, which are merged exactly at the end
(as online softmax allows: Milakov and Gimelshein, arXiv:1805.02867).

Bound by: the bandwidth of the caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.blocks_dense import NONE, Blocks, below
from sparsify_compiler.codegen.kernels.mask_dense import truths
from sparsify_compiler.codegen.kernels.powers import exp2, largest, powers, total

BLOCK = 128         # keys whose scores are held
SHARE = 256         # keys that are worth a part of their own
PARTS = 8           # at most
ALONE = 1 << 16     # multiply-adds below which waking other threads costs more than they bring


@dataclass(frozen=True)
class AttendStep:
    """How: sizes, both widths multiples of `lanes`; heads // groups neighbours share keys; columns of values that are summed together; blocks.

    cached  dtype of the caches, float32 or bfloat16
    padded  is the first key that counts given for each text? Without blocks only
    """

    width: int
    value_width: int
    heads: int
    groups: int
    scale: float
    lanes: int
    registers: int
    workers: int
    blocks: Blocks | None = None
    cached: str = "float32"
    padded: bool = False
    name = "attend_step"

    def compute(self) -> Any:
        """The PrimFunc f(query [B * H, D], key [B, G, S, D], value [B, G, S, E], past [1], starts or blocks' table and tiles, out [B * H, E])."""
        return e.function("main", lambda: _body(self))

    @property
    def shared(self) -> int:
        """Heads of a group."""
        return self.heads // self.groups


def _body(how: AttendStep) -> None:
    a = SimpleNamespace(**{name: e.int32() for name in ("B", "K", "G", "D", "V", "rows")})
    a.query = e.argument((a.rows, a.D), "float32")
    a.key, a.value = (e.argument((a.B, a.G, a.K, width), how.cached) for width in (a.D, a.V))
    a.past = e.opaque(e.cast("int32", e.load(e.argument((e.int32(),), "int64"), 0)))
    a.starts = e.argument((e.int32(),), "int64") if how.padded else None
    if how.blocks is not None:
        a.table, a.tiles = (e.argument(tuple(e.int32() for _ in range(size)), dtype) for size, dtype in ((4, "int32"), (3, "bool")))
    a.out = e.argument((a.rows, a.V), "float32")
    a.Q, a.keys = e.constant(1, "int32"), e.opaque(e.minimum(a.past + 1, a.K))
    a.parts = e.opaque(e.minimum(tirx.truncdiv(a.keys + (SHARE - 1), SHARE), PARTS))
    a.tasks = e.opaque(a.B * how.groups * a.parts)
    a.sums = e.scratch(a.tasks * (how.shared * how.value_width), "float32")
    a.tops, a.totals = (e.scratch(a.tasks * how.shared, "float32") for _ in range(2))
    if how.blocks is None:
        _run(how, a, True)
    elif not how.blocks.sometimes_dense:
        _run(how, a, False)
    else:
        e.choose(below(how.blocks, a), lambda: _run(how, a, True), lambda: _run(how, a, False))
    with powers(how.lanes), e.loop(a.B * how.heads) as row:
        _merge(how, a, row)


def _run(how: AttendStep, a: Any, dense: bool) -> None:
    def run(parallel: bool) -> None:
        with e.loop(a.tasks, parallel=parallel) as task, powers(how.lanes):
            _task(how, a, task, dense)

    if how.workers == 1:
        return run(False)
    work = e.cast("int64", a.B * how.heads) * e.cast("int64", a.keys) * (how.width + how.value_width)
    return e.choose(work < ALONE, lambda: run(False), lambda: run(True))


def _task(how: AttendStep, a: Any, task: Any, dense: bool) -> None:
    """A part of the keys, for the heads of a batch and group."""
    pair = e.opaque(tirx.truncdiv(task, a.parts))
    t = SimpleNamespace(number=task, batch=e.opaque(tirx.truncdiv(pair, how.groups)), part=e.opaque(task - pair * a.parts))
    t.group = e.opaque(pair - t.batch * how.groups)
    t.row = e.opaque(t.batch * how.heads + t.group * how.shared)
    t.scores = e.scratch(BLOCK * how.shared, "float32")
    t.sum = e.opaque(task * (how.shared * how.value_width))
    with e.loop(how.shared) as head:
        e.store(a.tops, e.constant(-math.inf, "float32"), task * how.shared + head)
        e.store(a.totals, e.zero(), task * how.shared + head)
    with e.loop(how.shared * how.value_width // how.lanes) as i:
        e.store(a.sums, _lanes(how, 0.0), t.sum + i * how.lanes, lanes=how.lanes)
    if dense:
        first = e.constant(0, "int32") if a.starts is None else e.opaque(e.cast("int32", e.load(a.starts, t.batch)))
        step = e.opaque(tirx.truncdiv(a.keys - first + a.parts - 1, a.parts))
        return _read(how, a, t, e.opaque(first + t.part * step), e.opaque(e.minimum(first + (t.part + 1) * step, a.keys)), None)
    return _blocks(how, a, t)


def _blocks(how: AttendStep, a: Any, t: Any) -> None:
    """The blocks of keys of the part that the token reads: those that some head of the group does, each by its own line of the table."""
    blocks = how.blocks
    assert blocks is not None
    columns = e.opaque(e.minimum(tirx.truncdiv(a.keys + (blocks.keys - 1), blocks.keys), a.table.shape[3]))
    step = e.opaque(tirx.truncdiv(columns + a.parts - 1, a.parts))
    line = e.opaque(tirx.truncdiv(a.past, blocks.queries))
    line = line if blocks.own else e.opaque(e.minimum(line, a.table.shape[2] - 1))
    place = e.opaque(a.past - line * blocks.queries)
    first_head = e.opaque(t.group * how.shared)

    def kind(head: Any, column: Any) -> Any:
        return e.load(a.table, t.batch if blocks.batch else 0, first_head + head if blocks.heads else 0, 0 if blocks.own else line, column)

    with e.loop(e.maximum(e.minimum(step, columns - t.part * step), 0)) as i:
        column = e.opaque(t.part * step + i)
        read = e.stack(1, "int32")
        e.store(read, NONE, 0)
        for head in range(how.shared if blocks.heads else 1):
            e.store(read, e.maximum(e.load(read, 0), kind(head, column)), 0)
        first = e.opaque(column * blocks.keys)

        def hide(head: Any, start: Any, count: Any, column: Any = column, first: Any = first) -> None:
            which = e.opaque(kind(head, column))
            with e.loop(count) as k, e.when(which != -1):
                allowed = e.load(a.tiles, e.maximum(which, 0), place, start - first + k)
                score = e.load(t.scores, head * BLOCK + k) + tirx.Select(which == NONE, e.constant(-math.inf, "float32"), truths(allowed, 1))
                e.store(t.scores, score, head * BLOCK + k)

        with e.when(tirx.NE(e.load(read, 0), NONE)):
            _read(how, a, t, first, e.opaque(e.minimum(first + blocks.keys, a.keys)), hide)


def _read(how: AttendStep, a: Any, t: Any, first: Any, end: Any, hide: Callable[..., None] | None) -> None:
    """Keys from `first` to before `end`."""
    with e.loop(e.maximum(tirx.truncdiv(end - first + (BLOCK - 1), BLOCK), 0)) as block:
        start = e.opaque(first + block * BLOCK)
        count = e.opaque(e.minimum(end - start, BLOCK))
        vectors = e.opaque(tirx.truncdiv(count + (how.lanes - 1), how.lanes))
        with e.loop(vectors) as some:
            _scores(how, a, t, start, some)
        with e.loop(how.shared) as head:
            with e.loop(vectors * how.lanes - count) as rest:
                e.store(t.scores, e.constant(-math.inf, "float32"), head * BLOCK + count + rest)
            if hide is not None:
                hide(head, start, count)
            _shares(how, a, t, head, vectors)
        _values(how, a, t, start, count)


def _scores(how: AttendStep, a: Any, t: Any, start: Any, some: Any) -> None:
    """scores[head][key] of as many keys as a vector has; keys past the last repeat it."""
    factor = _lanes(how, how.scale * math.log2(math.e))
    keys = [e.opaque(e.minimum(start + some * how.lanes + i, a.keys - 1)) for i in range(how.lanes)]
    with e.loop(how.shared) as head:
        sums = [e.Register(how.lanes, _lanes(how, 0.0)) for _ in keys]
        for d in range(0, how.width, how.lanes):
            query = e.let(e.load(a.query, t.row + head, d, lanes=how.lanes) * factor)
            for key, register in zip(keys, sums, strict=True):
                register.multiply_add(e.read_float(a.key, t.batch, t.group, key, d, lanes=how.lanes), query)
        columns = e.transpose([e.let(register.get()) for register in sums])
        while len(columns) > 1:
            columns = [e.let(one + other) for one, other in zip(columns[::2], columns[1::2], strict=True)]
        e.store(t.scores, columns[0], head * BLOCK + some * how.lanes, lanes=how.lanes)


def _shares(how: AttendStep, a: Any, t: Any, head: Any, vectors: Any) -> None:
    """Scores of a head become 2 ** (score - largest so far); what was summed before fades with that."""
    at = e.opaque(t.number * how.shared + head)
    before = e.let(e.load(a.tops, at))
    top, sum_ = e.Register(how.lanes, e.broadcast(before, how.lanes)), e.Register(how.lanes, _lanes(how, 0.0))
    with e.loop(vectors) as v:
        score = e.let(e.load(t.scores, head * BLOCK + v * how.lanes, lanes=how.lanes))
        top.set(tirx.Select(score < top.get(), top.get(), score))
    limit = e.let(largest(top.get(), how.lanes))
    finite = e.let(e.broadcast(tirx.Select(tirx.EQ(limit, e.constant(-math.inf, "float32")), e.zero(), limit), how.lanes))
    with e.loop(vectors) as v:
        place = e.opaque(head * BLOCK + v * how.lanes)
        share = exp2(e.load(t.scores, place, lanes=how.lanes) - finite, how.lanes)
        sum_.set(sum_.get() + share)
        e.store(t.scores, share, place, lanes=how.lanes)
    fade = e.let(exp2(e.broadcast(before, how.lanes) - finite, how.lanes))
    e.store(a.tops, limit, at)
    cell = e.stack(how.lanes, "float32")
    e.store(cell, fade, 0, lanes=how.lanes)
    e.store(a.totals, e.load(a.totals, at) * e.load(cell, 0) + total(sum_.get(), how.lanes), at)
    with e.loop(how.value_width // how.lanes) as i:
        place = e.opaque(t.sum + head * how.value_width + i * how.lanes)
        e.store(a.sums, e.load(a.sums, place, lanes=how.lanes) * fade, place, lanes=how.lanes)


def _values(how: AttendStep, a: Any, t: Any, start: Any, count: Any) -> None:
    """sums[head][column] += share * value."""
    vectors = how.value_width // how.lanes
    width = max(n for n in range(1, how.registers + 1) if vectors % n == 0)
    heads = max(n for n in range(1, how.shared + 1) if how.shared % n == 0 and n * width <= max(how.registers, width))
    with e.loop(vectors // width) as chunk, e.loop(how.shared // heads) as some:
        first = e.opaque(some * heads)
        column = e.opaque(chunk * (width * how.lanes))
        places = [[t.sum + (first + head) * how.value_width + column + v * how.lanes for v in range(width)] for head in range(heads)]
        sums = [[e.Register(how.lanes, e.load(a.sums, place, lanes=how.lanes)) for place in row] for row in places]
        with e.loop(count) as key:
            values = [e.let(e.read_float(a.value, t.batch, t.group, start + key, column + v * how.lanes, lanes=how.lanes)) for v in range(width)]
            for head, registers in enumerate(sums):
                share = e.let(e.broadcast(e.load(t.scores, (first + head) * BLOCK + key), how.lanes))
                for register, value in zip(registers, values, strict=True):
                    register.multiply_add(share, value)
        for row, registers in zip(places, sums, strict=True):
            for place, register in zip(row, registers, strict=True):
                e.store(a.sums, register.get(), place, lanes=how.lanes)


def _merge(how: AttendStep, a: Any, row: Any) -> None:
    """out of a head, from its parts; zeros where nothing was read."""
    batch = e.opaque(tirx.truncdiv(row, how.heads))
    inside = e.opaque(row - batch * how.heads)
    group = e.opaque(tirx.truncdiv(inside, how.shared))
    head = e.opaque(inside - group * how.shared)
    first = e.opaque((batch * how.groups + group) * a.parts)
    best, whole = (e.stack(1, "float32") for _ in range(2))
    e.store(best, e.constant(-math.inf, "float32"), 0)
    e.store(whole, e.zero(), 0)
    with e.loop(a.parts) as part:
        top = e.let(e.load(a.tops, (first + part) * how.shared + head))
        e.store(best, tirx.Select(top < e.load(best, 0), e.load(best, 0), top), 0)
    limit = e.let(tirx.Select(tirx.EQ(e.load(best, 0), e.constant(-math.inf, "float32")), e.zero(), e.load(best, 0)))
    cell = e.stack(how.lanes, "float32")
    with e.loop(a.parts) as part:
        at = e.opaque((first + part) * how.shared + head)
        fade = exp2(e.broadcast(e.load(a.tops, at) - limit, how.lanes), how.lanes)
        e.store(cell, fade, 0, lanes=how.lanes)
        e.store(whole, e.load(whole, 0) + e.load(a.totals, at) * e.load(cell, 0), 0)
        with e.loop(how.value_width // how.lanes) as i:
            place = e.opaque(at * how.value_width + i * how.lanes)
            e.store(a.sums, e.load(a.sums, place, lanes=how.lanes) * fade, place, lanes=how.lanes)
    sum_ = e.let(e.load(whole, 0))
    inverse = e.let(tirx.Select(tirx.EQ(sum_, e.zero()), e.zero(), e.constant(1.0, "float32") / sum_))
    with e.loop(how.value_width // how.lanes) as i:
        register = e.Register(how.lanes, _lanes(how, 0.0))
        with e.loop(a.parts) as part:
            place = e.opaque(((first + part) * how.shared + head) * how.value_width + i * how.lanes)
            register.set(register.get() + e.load(a.sums, place, lanes=how.lanes))
        e.store(a.out, register.get() * e.broadcast(inverse, how.lanes), row, i * how.lanes, lanes=how.lanes)


def _lanes(how: AttendStep, value: float) -> Any:
    return e.broadcast(e.constant(value, "float32"), how.lanes)
