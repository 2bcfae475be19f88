"""Which blocks of keys each block of queries reads, by the pages of its keys: ops/top_pages.py for every block of queries of a graph without torch.

Keys are summed up by pages, of which a block has some; each block of queries is scored against them by its mean, and takes the blocks of highest
score, beside what a pattern reads anyway. That comes as a table (blocks_dense.py), and so does what is found, for the queries at hand.

Bound by: nothing that matters beside the attention itself, which reads every chosen key for every query.
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
from sparsify_compiler.codegen.kernels.attend_arguments import PARTS
from sparsify_compiler.codegen.kernels.attend_numbers import operand
from sparsify_compiler.codegen.kernels.blocks_dense import Blocks, below, first_key
from sparsify_compiler.codegen.kernels.mask_dense import Mask
from sparsify_compiler.codegen.kernels.score_blocks_choice import cell, choose
from sparsify_compiler.codegen.vectors import AVX512, Vectors


@dataclass(frozen=True)
class ScoreBlocks:
    """How: sizes, how pages are scored (ops/top_pages.py: Pages), what counts, how the tensors lie.

    counted   the row of the mask, "first" or "last", that says which keys count; "" where all do, and there is no mask
    past      is there an int64 [1] of how many tokens the caches hold before these?
    blocks    of the table that is made: `before` and `by_head` are of the table of patterns
    """

    width: int
    heads: int
    groups: int
    scale: float
    causal: bool
    way: str
    page: int
    counted: str
    mask: Mask
    lie: tuple[str, str]
    past: bool
    blocks: Blocks
    workers: int
    cut_for: Vectors = AVX512
    name = "score_blocks"

    def compute(self) -> Any:
        """The PrimFunc f(query [B, H, Q, D], key [B, G, K, D], (mask [B or 1, 1, 1 or Q, K] bool,) (past [1],) shares float32 [H], least int32 [H],
        logs float32 of 0, 1, ... places of a pair of blocks, patterns int32 [1, 1 or H, NQ, NK], tiles, out int32 [B, H, rows, NK]: blocks_dense.py).

        Row i of out is of the i-th block, counted from the first token of the text, that a query of this call is in.
        """
        return e.function("main", lambda: _body(self), self.cut_for)

    @property
    def step(self) -> int:
        """Numbers of a head's width that are added at once."""
        return math.gcd(self.width, self.cut_for.lanes)

    @property
    def tables(self) -> int:
        """What is kept of a page: the sum of its keys; with their squares; the least and the largest of them."""
        return 1 if self.way == "mean" else 2


def _up(value: Any, size: int) -> Any:
    """How many of this size."""
    return e.opaque(tirx.truncdiv(value + (size - 1), size))


def _body(how: ScoreBlocks) -> None:
    a = SimpleNamespace(**{name: e.int32() for name in ("B", "Q", "K", "H", "G", "D", "rows", "NK")})
    a.query, a.key = operand(how.lie[0], (a.B, a.H, a.Q, a.D), "float32"), operand(how.lie[1], (a.B, a.G, a.K, a.D), "float32")
    a.mask = e.argument(tuple(e.int32() for _ in range(4)), how.mask.dtype) if how.counted else None
    past = e.argument((e.int32(),), "int64") if how.past else None
    a.shares, a.least, a.logs = (e.argument((e.int32(),), dtype) for dtype in ("float32", "int32", "float32"))
    a.patterns, a.tiles = (e.argument(tuple(e.int32() for _ in range(size)), dtype) for size, dtype in ((4, "int32"), (3, "bool")))
    a.out = e.argument((a.B, a.H, a.rows, a.NK), "int32")
    a.past = e.opaque(e.cast("int32", e.load(past, 0))) if how.past else e.constant(0, "int32")
    a.keys = e.opaque(e.minimum(a.past + a.Q, a.K)) if how.past else a.K
    a.pages, a.columns, a.base = _up(a.keys, how.page), _up(a.keys, how.blocks.keys), e.opaque(tirx.truncdiv(a.past, how.blocks.queries))
    a.kept = [e.scratch(a.B * how.groups * a.pages * how.width, "float32") for _ in range(how.tables)]
    a.numbers, a.texts = e.scratch(a.B * a.pages, "int32"), e.scratch(a.B, "int32")
    dense = below(how.blocks, a) if how.blocks.sometimes_dense else None
    if dense is None:
        return _run(how, a)
    with e.when(tirx.Not(dense)):
        _run(how, a)
    return None


def _run(how: ScoreBlocks, a: Any) -> None:
    with e.loop(a.B) as batch:
        e.store(a.texts, first_key(how.counted, how.mask, a, batch), batch)
    with e.loop(a.B * a.pages) as number:
        batch = e.opaque(tirx.truncdiv(number, a.pages))
        _count(how, a, batch, e.opaque(number - batch * a.pages))
    with e.loop(a.B * how.groups * a.pages, parallel=how.workers > 1) as number:
        _sum(how, a, e.opaque(number))
    rows = e.opaque(tirx.truncdiv(a.past + (a.Q - 1), how.blocks.queries) - a.base + 1)
    with e.loop(a.B * how.heads * rows, parallel=how.workers > 1) as number, e.llvm(e.vectors().text(*PARTS)):
        pair = e.opaque(tirx.truncdiv(number, rows))
        batch = e.opaque(tirx.truncdiv(pair, how.heads))
        choose(how, a, _scored(how, a, batch, e.opaque(pair - batch * how.heads), e.opaque(number - pair * rows)))


def _counts(how: ScoreBlocks, a: Any, batch: Any, key: Any) -> Any:
    """Does a key count?"""
    row = a.Q - 1 if how.counted == "last" and how.mask.varies[2] else 0
    return e.load(a.mask, batch if how.mask.varies[0] else 0, 0, row, key)


def _if_counts(how: ScoreBlocks, a: Any, batch: Any, key: Any, run: Callable[[], None]) -> None:
    if not how.counted:
        return run()
    with e.when(_counts(how, a, batch, key)):
        run()
    return None


def _count(how: ScoreBlocks, a: Any, batch: Any, page: Any) -> None:
    """How many keys of a page count."""
    first, total = e.opaque(page * how.page), cell(e.constant(0, "int32"))
    with e.loop(e.minimum(how.page, a.keys - first)) as i:
        _if_counts(how, a, batch, first + i, lambda: e.store(total, e.load(total, 0) + 1, 0))
    e.store(a.numbers, e.load(total, 0), batch * a.pages + page)


def _sum(how: ScoreBlocks, a: Any, number: Any) -> None:
    """What is kept of a page of a group."""
    pair = e.opaque(tirx.truncdiv(number, a.pages))
    batch, page, step = e.opaque(tirx.truncdiv(pair, how.groups)), e.opaque(number - pair * a.pages), how.step
    group, first = e.opaque(pair - batch * how.groups), e.opaque(page * how.page)

    def every(value: float) -> Any:
        return e.broadcast(e.constant(value, "float32"), step)

    with e.loop(how.width // step) as i:
        sums = [e.Register(step, every(0.0)) for _ in range(how.tables)]
        ends = [e.Register(step, every(value)) for value in ((math.inf, -math.inf) if how.way == "bounds" else ())]

        def add(key: Any) -> None:
            value = e.let(e.load(a.key.buffer, *a.key.at(batch, group, key), i * step, lanes=step))
            sums[0].set(sums[0].get() + value)
            if how.way == "normal":
                sums[1].multiply_add(value, value)
            for end, smaller in zip(ends, (True, False), strict=False):
                end.set(e.let((e.minimum if smaller else e.maximum)(end.get(), value)))

        with e.loop(e.minimum(how.page, a.keys - first)) as k:
            key = e.opaque(first + k)
            _if_counts(how, a, batch, key, lambda: add(key))
        for buffer, total in zip(a.kept, ends or sums, strict=True):
            if ends:    # what is no number stays none
                total.multiply_add(sums[0].get(), every(0.0))
            e.store(buffer, total.get(), number * how.width + i * step, lanes=step)


def _scored(how: ScoreBlocks, a: Any, batch: Any, head: Any, row: Any) -> Any:
    """The scores of all blocks of keys for one of queries: minus infinity where nothing is seen, infinity for no number."""
    size = how.blocks.queries
    c = SimpleNamespace(batch=batch, head=head, row=row, line=e.opaque(a.base + row), scores=e.scratch(a.columns, "float32"))
    c.start, c.stop = e.opaque(e.maximum(c.line * size, a.past)), e.opaque(e.minimum((c.line + 1) * size, a.past + a.Q))
    c.group, c.many, c.mean = e.opaque(tirx.truncdiv(head, how.heads // how.groups)), cell(e.constant(0, "int32")), e.scratch(how.width, "float32")
    with e.loop(c.stop - c.start) as i:
        _if_counts(how, a, batch, c.start + i, lambda: e.store(c.many, e.load(c.many, 0) + 1, 0))
    _mean(how, a, c)
    with e.loop(a.columns) as column:
        c.column = e.opaque(column)
        c.first = e.opaque(c.column * how.blocks.keys)
        c.end = e.opaque(e.minimum(c.first + how.blocks.keys, a.keys))
        value = cell(_block(how, a, c) + _open(how, a, c), "float32")
        bits = e.let(e.reinterpret("int32", e.load(value, 0)) & e.constant(0x7FFFFFFF, "int32"))
        with e.when(bits > e.constant(0x7F800000, "int32")):
            e.store(value, e.constant(math.inf, "float32"), 0)
        seen = c.seen > 0
        e.store(c.scores, tirx.Select(e.both(seen, c.first < c.stop) if how.causal else seen, e.load(value, 0), e.constant(-math.inf, "float32")),
                c.column)
    return c


def _mean(how: ScoreBlocks, a: Any, c: Any) -> None:
    """The mean of the block's queries that count, scaled."""
    step = how.step
    factor = e.let(e.constant(how.scale, "float32") / e.cast("float32", e.maximum(e.load(c.many, 0), 1)))
    with e.loop(how.width // step) as i:
        total = e.Register(step, e.broadcast(e.zero(), step))
        with e.loop(c.stop - c.start) as n:
            query = e.opaque(c.start - a.past + n)

            def add(query: Any = query) -> None:
                total.set(total.get() + e.load(a.query.buffer, *a.query.at(c.batch, c.head, query), i * step, lanes=step))

            _if_counts(how, a, c.batch, c.start + n, add)
        e.store(c.mean, total.get() * e.broadcast(factor, step), i * step, lanes=step)


def _block(how: ScoreBlocks, a: Any, c: Any) -> Any:
    """The log of the sum of exp of the scores of a block's pages; c.seen is how many of its keys count."""
    split = how.blocks.keys // how.page
    first = e.opaque(c.column * split)
    pages, scores = e.opaque(e.minimum(split, a.pages - first)), e.scratch(split, "float32")
    seen, top = cell(e.constant(0, "int32")), cell(e.constant(-math.inf, "float32"), "float32")
    with e.loop(pages) as i:
        number = e.opaque(e.load(a.numbers, c.batch * a.pages + first + i))
        score = _page(how, a, c, e.opaque(first + i), number) + e.load(a.logs, number)
        score = e.let(tirx.Select(number > 0, score, e.constant(-math.inf, "float32")))
        e.store(scores, score, i)
        e.store(seen, e.load(seen, 0) + number, 0)
        e.store(top, e.maximum(e.load(top, 0), score), 0)
    c.seen = e.opaque(e.load(seen, 0))
    if split == 1:
        return e.load(scores, 0)
    base, total = e.let(e.load(top, 0)), cell(e.zero(), "float32")
    with e.loop(pages) as i:
        difference = e.let((e.load(scores, i) - tirx.Select(c.seen > 0, base, e.zero())) * e.constant(math.log2(math.e), "float32"))
        e.store(total, e.load(total, 0) + e.lane(softmax.exp2(e.broadcast(difference, e.lanes())), 0), 0)
    logs = softmax.log2(e.let(e.broadcast(e.load(total, 0), e.lanes())))
    return base + e.lane(logs, 0) * e.constant(math.log(2), "float32")


def _page(how: ScoreBlocks, a: Any, c: Any, page: Any, number: Any) -> Any:
    """The score of a page with keys that count, without their number."""
    step, at = how.step, e.opaque(((c.batch * how.groups + c.group) * a.pages + page) * how.width)
    sums, share = e.Register(step, e.broadcast(e.zero(), step)), e.let(e.constant(1.0, "float32") / e.cast("float32", e.maximum(number, 1)))
    every, none = e.broadcast(share, step), e.broadcast(e.zero(), step)
    with e.loop(how.width // step) as i:
        mean = e.let(e.load(c.mean, i * step, lanes=step))
        kept = [e.let(e.load(buffer, at + i * step, lanes=step)) for buffer in a.kept]
        if how.way == "bounds":
            for least_or_most, end in zip((e.minimum, e.maximum), kept, strict=True):
                sums.multiply_add(e.let(least_or_most(mean, none)), end)
            sums.multiply_add(mean, none)   # what is no number stays none
        else:
            center = e.let(kept[0] * every)
            sums.multiply_add(mean, center)
            if how.way == "normal":
                spread = e.let(e.maximum(e.let(kept[1] * every - center * center), none))
                sums.multiply_add(e.let(mean * mean * e.broadcast(e.constant(0.5, "float32"), step)), spread)
    found = e.let(sums.get())
    return sum((e.lane(found, i) for i in range(1, step)), e.lane(found, 0)) if step > 1 else found


def _open(how: ScoreBlocks, a: Any, c: Any) -> Any:
    """The log of the share of a pair's places that are not after the diagonal."""
    if not how.causal:
        return e.zero()
    wide, high = e.opaque(c.end - c.first), e.opaque(c.stop - c.start)

    def until(position: Any) -> Any:
        """Such places of all rows before this position."""
        depth = e.opaque(e.maximum(position - c.first, 0))
        inside = e.opaque(e.minimum(depth, wide))
        return tirx.truncdiv(inside * (inside + 1), 2) + (depth - inside) * wide

    places = e.opaque(until(c.stop) - until(c.start))
    return e.load(a.logs, places) - e.load(a.logs, high) - e.load(a.logs, wide)
