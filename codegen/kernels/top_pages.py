"""top_pages: which blocks of keys a few query rows read, from what is kept of the pages of each: scores, choice and list in one call.

First the pages of a group are scored for all of its heads, some pages a task: vectors run along the width, as in attend_few. Pages of which nothing
is kept, as of the one at hand, are summed up from their keys. Then each head chooses (top_pages_choice.py).

Bound by: the bandwidth at which what is kept of the pages arrives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels import softmax
from sparsify_compiler.codegen.kernels.attend_arguments import PARTS, parameter, strided
from sparsify_compiler.codegen.kernels.top_pages_choice import choose
from sparsify_compiler.codegen.vectors import AVX512, Vectors

CHUNK = 64  # pages of a task


@dataclass(frozen=True)
class TopPages:
    """How: the dtype of queries and keys, how pages are scored (as ops/top_pages.py says), and how many heads are multiplied with a page at once."""

    dtype: str
    way: str
    rows: int
    cut_for: Vectors = AVX512
    name = "top_pages"

    def compute(self) -> Any:
        """The PrimFunc.

        f(query [B, H, Q, D], key [B, G, K, D], first, second [B, G, P, D] strided, key_mask uint8 [B, K], own uint8 [B, Q], open_share [NK],
        kinds int8 and tiles int32 [KB, KH, NK], shares [H], least [H], logs [page + 1] of 0, 1, ..., indices [B, H, NK], counts [B, H], tile_of,
        page, pages of a block, flags (1 key_mask, 2 own, 4 open_share, 8 tiles), scale)
        """
        return e.function("main", lambda: _body(self), self.cut_for)

    @property
    def tables(self) -> int:
        """Tensors of what is kept."""
        return 1 if self.way == "mean" else 2


def _arguments(how: TopPages) -> Any:
    a = SimpleNamespace(**{name: e.int32() for name in ("B", "H", "G", "Q", "K", "D", "P", "NK", "KB", "KH", "MB", "OB", "S", "L", "TB", "TH", "TK")})
    made = [parameter((a.B, a.H, a.Q, a.D), how.dtype), parameter((a.B, a.G, a.K, a.D), how.dtype)]
    made += [parameter((a.B, a.G, a.P, a.D), "float32") for _ in range(2)]
    a.key_mask, a.own = e.argument((a.MB, e.int32()), "uint8"), e.argument((a.OB, e.int32()), "uint8")
    a.open_share, a.kinds = e.argument((a.S,), "float32"), e.argument((a.KB, a.KH, a.NK), "int8")
    a.tiles = e.argument((a.TB, a.TH, a.TK), "int32")
    a.shares, a.least, a.logs = e.argument((a.H,), "float32"), e.argument((a.H,), "int32"), e.argument((a.L,), "float32")
    a.indices, a.counts = e.argument((a.B, a.H, a.NK), "int32"), e.argument((a.B, a.H), "int32")
    a.tile_of = e.argument((a.B, a.H, e.int32()), "int32")
    for name in ("page", "split", "flags"):
        setattr(a, name, e.builder.arg(name, e.int32()))
    a.scale = e.builder.arg("scale", e.builder.float32())
    a.query, a.key, a.first, a.second = (strided(*one) for one in made)
    for number, name in enumerate(("padded", "owned", "cut", "tiled")):
        setattr(a, name, e.let((a.flags & (1 << number)) > 0))
    return a


def _body(how: TopPages) -> None:
    a = _arguments(how)
    width = e.lanes()
    a.heads = e.opaque(tirx.truncdiv(a.H, a.G))  # of a group
    a.pages = e.opaque(tirx.truncdiv(a.K + (a.page - 1), a.page))
    a.wide = e.opaque(tirx.truncdiv(a.NK + (width - 1), width) * width)  # scores of a head, and room behind them
    a.chunks = e.opaque(tirx.truncdiv(a.pages + (CHUNK - 1), CHUNK))
    a.vectors = e.opaque(tirx.truncdiv(a.D, width))
    kept = SimpleNamespace(scores=e.scratch(a.B * a.H * a.split * a.wide, "float32"), high=e.scratch(a.B * a.H * a.D, "float32"),
                           low=e.scratch(a.B * a.H * a.D, "float32"))
    with e.llvm(e.vectors().text(*PARTS)):
        with e.loop(a.B * a.H) as head:
            _mean(how, a, kept, e.opaque(head))
        with e.loop(a.B * a.G * a.chunks, parallel=True) as task:
            _score(how, a, kept, e.opaque(task))
    with e.loop(a.B * a.H, parallel=True) as head, e.llvm(e.vectors().text(*PARTS)):
        choose(a, kept.scores, e.opaque(head))


def _read(buffer: Any, at: Any) -> Any:
    return e.let(e.read_float(buffer, at, lanes=e.lanes()))


def _mean(how: TopPages, a: Any, kept: Any, head: Any) -> None:
    """What the head's pages are multiplied with: the mean of its rows that count, scaled, or the parts of it that each table wants."""
    with e.loop(a.NK * a.split - a.pages) as i:  # the last block may have fewer pages
        _keep(a, kept, head, e.opaque(a.pages + i), e.constant(-math.inf, "float32"))
    batch = e.opaque(tirx.truncdiv(head, a.H))
    number = e.stack(1, "int32")
    e.store(number, a.Q, 0)
    with e.when(a.owned):
        e.store(number, 0 * a.Q, 0)
        with e.loop(a.Q) as row:
            e.store(number, e.load(number, 0) + e.cast("int32", e.load(a.own, batch, row)), 0)
    many = e.let(e.cast("float32", e.maximum(e.load(number, 0), 1)))
    with e.loop(a.vectors) as i:
        total = e.Register(e.lanes(), softmax.lanes(0.0))
        with e.loop(a.Q) as row:
            counts = e.stack(1, "int32")
            e.store(counts, tirx.const(1, "int32"), 0)
            with e.when(a.owned):
                e.store(counts, e.cast("int32", e.load(a.own, batch, row)), 0)
            with e.when(e.load(counts, 0) > 0):
                at = a.query.at(batch, e.opaque(head - batch * a.H), row)
                total.set(total.get() + _read(a.query.elements, at + e.cast("int64", i * e.lanes())))
        mean = e.let(total.get() / e.broadcast(many, e.lanes()) * e.broadcast(a.scale, e.lanes()))
        parts = (mean, mean)
        if how.way == "bounds":  # of the smallest keys, of the largest
            parts = tuple(e.let(tirx.Select(away, softmax.lanes(0.0), mean)) for away in (mean > softmax.lanes(0.0), mean < softmax.lanes(0.0)))
        if how.way == "normal":
            parts = mean, e.let(mean * mean * softmax.lanes(0.5))
        for buffer, part in zip((kept.high, kept.low), parts, strict=True):
            e.store(buffer, part, head * a.D + i * e.lanes(), lanes=e.lanes())


def _score(how: TopPages, a: Any, kept: Any, task: Any) -> None:
    """Scores of some pages of a group, for all of its heads."""
    group = e.opaque(tirx.truncdiv(task, a.chunks))
    batch = e.opaque(tirx.truncdiv(group, a.G))
    c = SimpleNamespace(group=group, batch=batch, own=e.opaque(group - batch * a.G), begin=e.opaque((task - group * a.chunks) * CHUNK))
    c.stop = e.opaque(e.minimum(c.begin + CHUNK, a.pages))
    across = e.lanes() // how.rows
    c.numbers, c.staged = e.scratch(CHUNK, "int32"), [e.scratch(a.D * across, "float32") for _ in range(2)]
    with e.loop(c.stop - c.begin) as page:
        e.store(c.numbers, _number(a, c, e.opaque(c.begin + page)), page)
    with e.loop(tirx.truncdiv(c.stop - c.begin + (across - 1), across)) as some:
        first = e.opaque(c.begin + some * across)
        pages = [e.opaque(e.minimum(first + i, c.stop - 1)) for i in range(across)]

        def held(pages: Any = pages) -> None:
            tables = (a.first, a.second)[:how.tables]
            _products(how, a, kept, c, pages, [(table.elements, [table.at(c.batch, c.own, page) for page in pages]) for table in tables])

        def found(pages: Any = pages) -> None:
            for number, page in enumerate(pages):
                _stage(how, a, c, page, number)
            starts = [e.let(e.cast("int64", number * a.D)) for number in range(across)]
            _products(how, a, kept, c, pages, [(buffer, starts) for buffer in c.staged[:how.tables]])

        e.choose(pages[-1] < a.P, held, found)


def _number(a: Any, c: Any, page: Any) -> Any:
    """How many keys of a page count."""
    begin = e.opaque(page * a.page)
    end = e.opaque(e.minimum(begin + a.page, a.K))
    number = e.stack(1, "int32")
    e.store(number, end - begin, 0)
    with e.when(a.padded):
        e.store(number, begin - begin, 0)
        with e.loop(end - begin) as n:
            e.store(number, e.load(number, 0) + e.cast("int32", e.load(a.key_mask, c.batch, begin + n)), 0)
    return e.load(number, 0)


def _stage(how: TopPages, a: Any, c: Any, page: Any, number: int) -> None:
    """What there is to know of a page: as it is kept, or from its keys."""
    def copied() -> None:
        for table, room in zip((a.first, a.second)[:how.tables], c.staged, strict=False):
            at = table.at(c.batch, c.own, page)
            with e.loop(a.vectors) as i:
                e.store(room, _read(table.elements, at + e.cast("int64", i * e.lanes())), number * a.D + i * e.lanes(), lanes=e.lanes())

    def summed() -> None:
        begin = e.opaque(page * a.page)
        with e.loop(a.vectors) as i:
            sums = [e.Register(e.lanes(), softmax.lanes(start)) for start in ((math.inf, -math.inf) if how.way == "bounds" else (0.0, 0.0))]
            with e.loop(e.minimum(a.K - begin, a.page)) as n:
                counts = e.stack(1, "int32")
                e.store(counts, tirx.const(1, "int32"), 0)
                with e.when(a.padded):
                    e.store(counts, e.cast("int32", e.load(a.key_mask, c.batch, begin + n)), 0)
                with e.when(e.load(counts, 0) > 0):
                    key = _read(a.key.elements, a.key.at(c.batch, c.own, begin + n) + e.cast("int64", i * e.lanes()))
                    _add(how, sums, key)
            for room, total in zip(c.staged[:how.tables], sums, strict=False):
                e.store(room, total.get(), number * a.D + i * e.lanes(), lanes=e.lanes())

    e.choose(page < a.P, copied, summed)


def _add(how: TopPages, sums: list[Any], key: Any) -> None:
    """One key more."""
    if how.way == "bounds":
        for total, smaller in zip(sums, (True, False), strict=True):
            before = e.let(total.get())
            nearer = tirx.Select(key < before if smaller else key > before, key, before)
            total.set(softmax.unless_nan(key, nearer))  # what is no number stays none: no comparison is true of it
        return
    sums[0].set(sums[0].get() + key)
    if how.tables > 1:
        sums[1].multiply_add(key, key)


def _products(how: TopPages, a: Any, kept: Any, c: Any, pages: list[Any], tables: list[Any]) -> None:
    """Scores of as many pages as make a vector with `rows` heads, for all heads of the group."""
    across = len(pages)
    numbers = [e.opaque(e.load(c.numbers, page - c.begin)) for page in pages]
    shares = [e.let(tirx.const(1.0, "float32") / e.cast("float32", e.maximum(number, 1))) for number in numbers]
    with e.loop(tirx.truncdiv(a.heads + (how.rows - 1), how.rows)) as some:
        heads = [e.opaque(c.group * a.heads + e.minimum(some * how.rows + row, a.heads - 1)) for row in range(how.rows)]
        sums = [e.Register(e.lanes(), softmax.lanes(0.0)) for _ in range(e.lanes())]
        with e.loop(a.vectors) as i:
            given = [[e.let(e.load(buffer, head * a.D + i * e.lanes(), lanes=e.lanes())) for buffer in (kept.high, kept.low)[:how.tables]]
                     for head in heads]
            for number in range(across):
                of_page = [e.let(e.load(buffer, starts[number] + e.cast("int64", i * e.lanes()), lanes=e.lanes())) for buffer, starts in tables]
                if how.way == "normal":
                    share = e.broadcast(shares[number], e.lanes())
                    center = e.let(of_page[0] * share)
                    spread = e.let(of_page[1] * share - center * center)
                    of_page = [center, softmax.larger(spread, softmax.lanes(0.0))]
                for row, queries in enumerate(given):
                    for value, query in zip(of_page, queries, strict=True):
                        sums[row * across + number].multiply_add(value, query)
        found = _added([e.let(total.get()) for total in sums])
        for row, head in enumerate(heads):
            for number, page in enumerate(pages):
                score = e.let(e.lane(found, row * across + number))
                score = score * shares[number] if how.way == "mean" else score
                none = tirx.EQ(numbers[number], 0)
                value = tirx.Select(none, e.constant(-math.inf, "float32"), score + e.load(a.logs, numbers[number]))
                _keep(a, kept, head, page, value)


def _keep(a: Any, kept: Any, head: Any, page: Any, score: Any) -> None:
    """Store the score of a page; those of pages that stand at the same place of their blocks are neighbours."""
    block = e.opaque(tirx.truncdiv(page, a.split))
    e.store(kept.scores, score, (head * a.split + page - block * a.split) * a.wide + block)


def _added(vectors: list[Any]) -> Any:
    """One vector of the vectors' sums."""
    while len(vectors) > 1:
        vectors = [e.let(e.shuffle(one, other, range(0, 2 * e.lanes(), 2)) + e.shuffle(one, other, range(1, 2 * e.lanes(), 2)))
                   for one, other in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]
