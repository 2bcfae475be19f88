"""softmax(q kᵀ scale + mask) v over all keys, or some blocks of them, on any processor: for graphs that run without torch.

A task is up to `lanes` × `vectors` rows, query positions of the heads that share keys, which lie along vectors: a key or a value is read once for all
of them, and broadcast. Blocks of keys come one after the other, with the running maximum of online softmax (Milakov and Gimelshein, arXiv:1805.02867;
FlashAttention, arXiv:2205.14135), so that nothing of the size of queries × keys is ever in memory.

Bound by: the FMA rate for many rows; for few, as in decoding, a load for every `lanes` multiply-adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.attend_numbers import NUMBERS, Floats, Pairs, flat, operand
from sparsify_compiler.codegen.kernels.blocks_dense import Blocks, below, each_block, part_of_blocks, parts_of_blocks
from sparsify_compiler.codegen.kernels.mask_dense import Mask, add_mask, hide_later_keys
from sparsify_compiler.codegen.kernels.powers import exp2, larger, powers
from sparsify_compiler.codegen.vectors import AVX512

BLOCK = 64          # keys of a block: its scores for 32 rows are 8 KiB
ALONE = 1 << 16     # multiply-adds below which waking other threads costs more than they bring


@dataclass(frozen=True)
class AttendDense:
    """How: sizes, what is masked, how the tensors lie, registers.

    width, value_width   of a head's queries and keys, and of its values
    heads, groups        of queries, and of keys and values: heads // groups neighbours share one
    lie                  of query, key, value and out: "bhsd" or "bshd", which is how a linear layer leaves them
    past                 is there an int64 [1] of how many tokens the caches hold before these? Then those and as many keys as queries are read
    blocks               of keys that are read, where they are not all
    lanes, vectors       rows that are computed together; together: keys, or columns of values, that are
    dtype                of query, key, value and out; bfloat16 is multiplied in pairs, and widths are whole vectors of them
    """

    width: int
    value_width: int
    heads: int
    groups: int
    scale: float
    causal: bool
    mask: Mask
    lie: tuple[str, str, str, str]
    past: bool
    lanes: int
    vectors: int
    together: int
    workers: int
    blocks: Blocks | None = None
    dtype: str = "float32"
    name = "attend_dense"

    def compute(self) -> Any:
        """The PrimFunc f(query, key, value, (mask [B or 1, H or 1, Q or 1, K],) (past [1],) (table, tiles, (patterns): blocks_dense.py) out)."""
        return e.function("main", lambda: _body(self))

    @property
    def rows(self) -> int:
        """Of a task."""
        return self.lanes * self.vectors

    @property
    def numbers(self) -> Floats | Pairs:
        """What is multiplied."""
        return NUMBERS[self.dtype]

    @property
    def factor(self) -> float:
        """Of scores, which are powers of two."""
        return self.scale * math.log2(math.e)


def _body(how: AttendDense) -> None:
    a = SimpleNamespace(**{name: e.int32() for name in ("B", "Q", "K", "H", "G", "D", "V")})
    a.query = operand(how.lie[0], (a.B, a.H, a.Q, a.D), how.dtype)
    a.key = operand(how.lie[1], (a.B, a.G, a.K, a.D), how.dtype)
    a.value = operand(how.lie[2], (a.B, a.G, a.K, a.V), how.dtype)
    a.mask = e.argument(tuple(e.int32() for _ in range(4)), how.mask.dtype) if how.mask.dtype else None
    past = e.argument((e.int32(),), "int64") if how.past else None
    if how.blocks is not None:
        a.table, a.tiles = (e.argument(tuple(e.int32() for _ in range(size)), dtype) for size, dtype in ((4, "int32"), (3, "bool")))
        if how.blocks.own and how.blocks.starts:
            a.patterns = e.argument(tuple(e.int32() for _ in range(4)), "int32")
    a.out = operand(how.lie[3], (a.B, a.H, a.Q, a.V), how.dtype)
    a.keys_flat, a.values_flat = (flat(one.buffer) for one in (a.key, a.value))
    a.past = e.opaque(e.cast("int32", e.load(past, 0))) if how.past else e.constant(0, "int32")
    a.keys = e.opaque(e.minimum(a.past + a.Q, a.K)) if how.past else a.K
    if how.blocks is None:
        return _run(how, a, True)
    if not how.blocks.sometimes_dense:
        return _run(how, a, False)
    return e.choose(below(how.blocks, a), lambda: _run(how, a, True), lambda: _run(how, a, False))


def _run(how: AttendDense, a: Any, dense: bool) -> None:
    """All tasks, over all keys or by blocks."""
    lines = e.opaque(a.Q * (how.heads // how.groups))
    parts = e.opaque(tirx.truncdiv(lines + (how.rows - 1), how.rows)) if dense else parts_of_blocks(how, a)
    heads = how.heads if not dense and how.blocks and how.blocks.heads else how.groups
    tasks = e.opaque(a.B * heads * parts)

    def run(parallel: bool) -> None:
        with e.loop(tasks, parallel=parallel) as task, powers(how.lanes), how.numbers.text(how.lanes), e.llvm(AVX512.text("scalar")):
            pair = e.opaque(tirx.truncdiv(task, parts))
            t = SimpleNamespace(batch=e.opaque(tirx.truncdiv(pair, heads)))
            head = e.opaque(pair - t.batch * heads)
            t.group = head if heads == how.groups else e.opaque(tirx.truncdiv(head, how.heads // how.groups))
            t.head = e.opaque(head * (how.heads // heads))
            if dense:
                t.start, t.each, t.lines, t.first = 0, a.Q, lines, e.opaque((task - pair * parts) * how.rows)
                _task(how, a, t, partial(_every_key, how, a, t))
            else:
                with part_of_blocks(how, a, t, e.opaque(task - pair * parts), how.heads // heads):
                    _task(how, a, t, partial(each_block, how, a, t, partial(_last_key, how, a, t), partial(_read, how, a, t)))

    if how.workers == 1:
        return run(False)
    work = e.cast("int64", lines) * e.cast("int64", a.keys) * (how.width + how.value_width)
    return e.choose(work * e.cast("int64", a.B * how.groups) < ALONE, lambda: run(False), lambda: run(True))


def _task(how: AttendDense, a: Any, t: Any, keys: Callable[[], None]) -> None:
    """Some rows of one batch and group: of `each` queries from `start` on, for the heads from `head` on; and the keys that they read."""
    t.queries = e.scratch(how.width // how.numbers.of * how.rows, how.numbers.word)
    t.scores = e.scratch(-(-BLOCK // how.together) * how.together * how.rows, "float32")     # of whole groups of keys
    t.sums = e.scratch(how.value_width * how.rows, "float32")
    how.numbers.room(how, t, BLOCK)
    t.tops, t.totals, t.places = (e.stack(how.rows, dtype) for dtype in ("float32", "float32", "int32"))
    t.line = lambda i: _line(t, i)
    _pack(how, a, t)
    for start in range(0, how.rows, how.lanes):
        e.store(t.tops, _lanes(how, -math.inf), start, lanes=how.lanes)
        e.store(t.totals, _lanes(how, 0.0), start, lanes=how.lanes)
    with e.loop(how.value_width * how.vectors) as i:
        e.store(t.sums, _lanes(how, 0.0), i * how.lanes, lanes=how.lanes)
    keys()
    _write(how, a, t)


def _every_key(how: AttendDense, a: Any, t: Any) -> None:
    _read(how, a, t, e.constant(0, "int32"), _last_key(how, a, t))


def _read(how: AttendDense, a: Any, t: Any, first: Any, end: Any, more: Callable[[], None] | None = None) -> None:
    """Keys from `first` to before `end`; more() changes their scores too."""
    with e.loop(tirx.truncdiv(end - first + (BLOCK - 1), BLOCK)) as block:
        t.key = e.opaque(first + block * BLOCK)
        t.count = e.opaque(e.minimum(end - t.key, BLOCK))
        _scores(how, a, t)
        add_mask(how, a, t)
        if how.causal:
            hide_later_keys(how, a, t)
        if more is not None:
            more()
        _values(how, a, t, _shares(how, t))


def _line(t: Any, i: Any) -> tuple[Any, Any]:
    """Head and query of a row of the task; rows past the last repeat it: they are not stored."""
    row = e.opaque(e.minimum(t.first + i, t.lines - 1))
    head = e.opaque(tirx.truncdiv(row, t.each))
    return e.opaque(t.head + head), e.opaque(t.start + row - head * t.each)


def _last_key(how: AttendDense, a: Any, t: Any) -> Any:
    """Behind the last key that some row reads."""
    if not how.causal:
        return a.keys
    last = e.opaque(e.minimum(t.first + (how.rows - 1), t.lines - 1))
    head, other = (e.opaque(tirx.truncdiv(row, t.each)) for row in (t.first, last))
    found = e.either(tirx.EQ(head, other), a.past + t.start + last - other * t.each + 1, a.past + t.start + t.each)
    return e.opaque(e.minimum(found, a.keys))


def _pack(how: AttendDense, a: Any, t: Any) -> None:
    """queries[d][row], in words of what is multiplied; and which query each row is."""
    lanes, numbers, words = how.lanes, how.numbers, how.width // how.numbers.of
    with e.loop(how.vectors) as v:
        lines = [t.line(v * lanes + i) for i in range(lanes)]
        for i, (_, query) in enumerate(lines):
            e.store(t.places, query, v * lanes + i)
        starts = [a.query.at(t.batch, head, query) for head, query in lines]
        with e.loop(words // lanes) as chunk:
            rows = [e.let(numbers.query(numbers.load(a.query.buffer, *start, chunk * lanes, lanes=lanes), how.factor, lanes)) for start in starts]
            for d, column in enumerate(e.transpose(rows)):
                e.store(t.queries, column, (chunk * lanes + d) * how.rows + v * lanes, lanes=lanes)
        for d in range(words // lanes * lanes, words):
            for i, start in enumerate(starts):
                e.store(t.queries, numbers.query(numbers.load(a.query.buffer, *start, d), how.factor, 1), d * how.rows + v * lanes + i)


def _scores(how: AttendDense, a: Any, t: Any) -> None:
    """scores[key][row] of a block; keys past the last repeat it, and are left out of all that follows."""
    with e.loop(tirx.truncdiv(t.count + (how.together - 1), how.together)) as some:
        first = e.opaque(some * how.together)
        keys = [a.key.place(t.batch, t.group, e.minimum(t.key + first + i, a.keys - 1)) for i in range(how.together)]
        sums = [[e.Register(how.lanes, _lanes(how, 0.0)) for _ in range(how.vectors)] for _ in keys]
        with e.loop(how.width // how.numbers.of) as d:
            queries = [e.let(e.load(t.queries, d * how.rows + v * how.lanes, lanes=how.lanes)) for v in range(how.vectors)]
            for key, registers in zip(keys, sums, strict=True):
                number = e.let(e.broadcast(how.numbers.number(a.keys_flat, key + e.cast("int64", d * how.numbers.of)), how.lanes))
                for register, query in zip(registers, queries, strict=True):
                    how.numbers.multiply_add(register, query, number)
        for i, registers in enumerate(sums):
            for v, register in enumerate(registers):
                e.store(t.scores, how.numbers.score(register.get(), how.factor, how.lanes), (first + i) * how.rows + v * how.lanes, lanes=how.lanes)


def _shares(how: AttendDense, t: Any) -> list[Any]:
    """Scores become 2 ** (score - largest so far); by how much what was summed before fades with that, a vector a register of rows."""
    fades = []
    for v in range(how.vectors):
        start = v * how.lanes
        before = e.let(e.load(t.tops, start, lanes=how.lanes))
        top, total = e.Register(how.lanes, before), e.Register(how.lanes, _lanes(how, 0.0))
        with e.loop(t.count) as key:
            top.set(larger(e.load(t.scores, key * how.rows + start, lanes=how.lanes), top.get(), how.lanes))
        limit = e.let(top.get())
        finite = e.let(tirx.Select(tirx.EQ(limit, _lanes(how, -math.inf)), _lanes(how, 0.0), limit))
        how.numbers.keep_shares(how, t, start, finite, total)
        fade = exp2(before - finite, how.lanes)
        fades.append(fade)
        e.store(t.tops, limit, start, lanes=how.lanes)
        e.store(t.totals, e.load(t.totals, start, lanes=how.lanes) * fade + total.get(), start, lanes=how.lanes)
    return fades


def _values(how: AttendDense, a: Any, t: Any, fades: list[Any]) -> None:
    """sums[column][row] = sums * fade + shares * values."""
    values = how.numbers.values(how, a, t)
    columns = max(size for size in range(1, how.together + 1) if how.value_width % size == 0)
    with e.loop(how.value_width // columns) as some:
        first = e.opaque(some * columns)
        places = [[(first + i) * how.rows + v * how.lanes for v in range(how.vectors)] for i in range(columns)]
        sums = [[e.Register(how.lanes, e.load(t.sums, place, lanes=how.lanes) * fade) for place, fade in zip(row, fades, strict=True)]
                for row in places]
        with e.loop(tirx.truncdiv(t.count + (how.numbers.of - 1), how.numbers.of)) as step:
            shares = [e.let(e.load(t.shares, step * how.rows + v * how.lanes, lanes=how.lanes)) for v in range(how.vectors)]
            buffer, value = values(step, first)
            for i, registers in enumerate(sums):
                number = e.let(e.broadcast(e.load(buffer, value + i), how.lanes))
                for register, share in zip(registers, shares, strict=True):
                    how.numbers.multiply_add(register, share, number)
        for row, registers in zip(places, sums, strict=True):
            for place, register in zip(row, registers, strict=True):
                e.store(t.sums, register.get(), place, lanes=how.lanes)


def _write(how: AttendDense, a: Any, t: Any) -> None:
    """out, of the rows that there are; zeros for one that reads no key."""
    lanes = how.lanes
    with e.loop(how.vectors) as v:
        total = e.let(e.load(t.totals, v * lanes, lanes=lanes))
        inverse = e.let(tirx.Select(tirx.EQ(total, _lanes(how, 0.0)), _lanes(how, 0.0), _lanes(how, 1.0) / total))
        with e.loop(how.value_width) as d:
            at = e.opaque(d * how.rows + v * lanes)
            e.store(t.sums, e.load(t.sums, at, lanes=lanes) * inverse, at, lanes=lanes)
        lines = [t.line(v * lanes + i) for i in range(lanes)]
        with e.loop(how.value_width // lanes) as chunk:
            rows = e.transpose([e.let(e.load(t.sums, (chunk * lanes + i) * how.rows + v * lanes, lanes=lanes)) for i in range(lanes)])
            for i, ((head, query), row) in enumerate(zip(lines, rows, strict=True)):
                with e.when(t.first + v * lanes + i < t.lines):
                    e.write_float(a.out.buffer, row, *a.out.at(t.batch, head, query), chunk * lanes, lanes=lanes)
        for i, (head, query) in enumerate(lines):
            for d in range(how.value_width // lanes * lanes, how.value_width):
                with e.when(t.first + v * lanes + i < t.lines):
                    e.write_float(a.out.buffer, e.load(t.sums, d * how.rows + v * lanes + i), *a.out.at(t.batch, head, query), d)


def _lanes(how: AttendDense, value: float) -> Any:
    return e.broadcast(e.constant(value, "float32"), how.lanes)
