"""y = select(x) W + bias for few rows of x, W input by input: rows of W that no row of x selects are never read.

First the scores of x are compared with the limit, and what is selected is written next to each other: its place and its difference from the
centre (whose own part of y lies in the bias), 0 for a row of x that does not select it itself. Then every task goes over the selected rows of W,
eight at a time, and adds them to its own outputs, which stay in L1. Every row of W is a run of whole cache lines for a task, so the processor reads
ahead by itself, and memory is read at the pace of a copy; asking for the next rows by prefetch instructions costs a quarter of that (measured).

Bound by: the bandwidth at which the selected rows of W arrive; the FMA rate from some 8 rows of x on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen import emit_tiles as t

PARTS = Path(__file__).with_name("gather.ll")
LANES = 16
TOGETHER = 8     # rows of W
NEAR = 512       # columns of them that several rows of x are multiplied with in turn


@dataclass(frozen=True)
class GatherRows:
    """How: `columns` outputs a task (a multiple of 64), on torch's threads or on the caller's alone."""

    dtype: str       # of x, W and y: "float32" or "bfloat16"
    columns: int
    scaled: bool
    centered: bool
    parallel: bool
    name = "gather_rows"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K], limit [1 or M], scale [K], center [K], weight [K, W], bias [W], y [M, N]); W a multiple of 64, N <= W.

        Weights of bfloat16 come as int32 words of two, [K, W / 2], and the bias in the order of the sums: 16 even outputs, then the odd ones.
        """
        return e.function("main", lambda: _body(self))

    @property
    def step(self) -> int:
        """Outputs of one load."""
        return LANES * (2 if self.dtype == "bfloat16" else 1)


class _Arguments:
    """The parameters, and what is written on the way: places [K], values [M, K], sums [M, W]."""

    def __init__(self, how: GatherRows) -> None:
        self.M, self.N, self.K, self.W, self.L = (e.int32() for _ in range(5))
        self.x = e.argument((self.M, self.K), how.dtype)
        self.limit = e.argument((self.L,), "float32")
        self.scale = e.argument((self.K if how.scaled else e.int32(),), "float32")
        self.center = e.argument((self.K if how.centered else e.int32(),), "float32")
        self.weight = e.argument((self.K, e.int32()), "float32" if how.dtype == "float32" else "int32")
        self.bias = e.argument((self.W,), "float32")
        self.y = e.argument((self.M, self.N), how.dtype)
        self.stride = e.let(self.K + LANES)
        self.places = e.scratch(self.stride, "int32")
        self.values = e.scratch(self.M * self.stride, "float32")
        self.sums = e.scratch(self.M * self.W, "float32")


def _body(how: GatherRows) -> None:
    a = _Arguments(how)
    found = e.stack(1, "int32")
    e.store(found, tirx.const(0, "int32"), 0)
    with e.llvm(PARTS.read_text()), e.loop(e.floordiv(a.K, LANES)) as block:
        _select(a, how, found, e.let(block * LANES))
    with e.loop(a.K - e.floordiv(a.K, LANES) * LANES) as rest:
        _select_one(a, how, found, e.let(e.floordiv(a.K, LANES) * LANES + rest))
    count = e.let(e.load(found, 0))
    with e.loop(e.floordiv(a.W + (how.columns - 1), how.columns), parallel=how.parallel) as task:
        start = e.let(task * how.columns)
        sum_rows(a, how, count, a.M, start, e.let(e.minimum(a.W - start, how.columns)))


def _score(a: _Arguments, how: GatherRows, m: Any, at: Any, lanes: int) -> tuple[Any, Any]:
    """What is multiplied with W, and its score."""
    value = e.read_float(a.x, m, at, lanes=lanes)
    value = e.let(value - e.load(a.center, at, lanes=lanes)) if how.centered else e.let(value)
    size = e.absolute(value, lanes)
    return value, e.let(size * e.load(a.scale, at, lanes=lanes) if how.scaled else size)


def _limit(a: _Arguments, m: Any) -> Any:
    return e.load(a.limit, e.minimum(m, a.L - 1))


def _select(a: _Arguments, how: GatherRows, found: Any, at: Any) -> None:
    """16 inputs: those that any row selects are taken."""
    union = e.stack(1, "int32")
    e.store(union, tirx.const(0, "int32"), 0)
    with e.loop(a.M) as m:
        _, score = _score(a, how, m, at, LANES)
        e.store(union, e.load(union, 0) | e.external("int32", "selected", score, _limit(a, m)), 0)
    mask, count = e.let(e.load(union, 0)), e.let(e.load(found, 0))
    with e.loop(a.M) as m:
        value, score = _score(a, how, m, at, LANES)
        own = e.external("float32x16", "only", value, e.external("int32", "selected", score, _limit(a, m)))
        e.builder.evaluate(tirx.call_extern("int32", "compress_values", t.address(a.values, m * a.stride + count), own, mask))
    taken = tirx.call_extern("int32", "compress_places", t.address(a.places, count), at, mask)
    e.store(found, count + taken, 0)


def _select_one(a: _Arguments, how: GatherRows, found: Any, at: Any) -> None:
    """One of the inputs behind the last whole 16: taken always, with 0 for a row that does not select it."""
    count = e.let(e.load(found, 0))
    with e.loop(a.M) as m:
        value, score = _score(a, how, m, at, 1)
        e.store(a.values, tirx.Select(score < _limit(a, m), e.zero(), value), m * a.stride + count)
    e.store(a.places, at, count)
    e.store(found, count + 1, 0)


def sum_rows(a: Any, how: Any, count: Any, rows: Any, start: Any, width: Any) -> None:
    """All rows of x times one task's columns of W."""
    with e.loop(rows) as m, e.loop(e.floordiv(width, LANES)) as j:
        e.store(a.sums, e.load(a.bias, start + j * LANES, lanes=LANES), m * a.W + start + j * LANES, lanes=LANES)
    whole = e.let(e.floordiv(count, TOGETHER))
    with e.loop(whole) as group:
        _add(a, how, rows, group * TOGETHER, TOGETHER, start, width)
    with e.loop(count - whole * TOGETHER) as rest:
        _add(a, how, rows, whole * TOGETHER + rest, 1, start, width)
    with e.loop(rows) as m, e.loop(e.floordiv(width, how.step)) as j:
        column = e.let(start + j * how.step)
        e.store_tail(a.y, _finished(a, how, e.let(m * a.W + column)), how.step, m, column, a.N)


def _add(a: Any, how: Any, rows: Any, first: Any, together: int, start: Any, width: Any) -> None:
    """sums += values * rows of W, `together` of them from number `first` on: some columns for all rows of x, while they are in L1, then the next."""
    first = e.let(first)
    places = [e.wide(e.load(a.places, first + i)) for i in range(together)]
    near = e.let(tirx.Select(tirx.EQ(rows, 1), width, tirx.const(NEAR, "int32")))
    with e.loop(e.floordiv(width + near - 1, near)) as part:
        begin = e.let(start + part * near)
        steps = e.let(e.floordiv(e.minimum(start + width - begin, near), how.step))
        with e.loop(rows) as m:
            _multiply(a, how, e.let(m), first, places, begin, steps)


def _multiply(a: Any, how: Any, m: Any, first: Any, places: list[Any], begin: Any, steps: Any) -> None:
    """One row of x and `steps` loads of each of these rows of W."""
    factors = [e.let(e.broadcast(e.load(a.values, m * a.stride + first + i), LANES)) for i in range(len(places))]
    with e.loop(steps) as j:
        column, at = e.let(e.floordiv(begin, how.step // LANES) + j * LANES), e.let(m * a.W + begin + j * how.step)
        totals = [e.load(a.sums, at + half * LANES, lanes=LANES) for half in range(how.step // LANES)]
        for row, factor in zip(places, factors, strict=True):
            for half, weights in enumerate(_weights(a, how, row, e.wide(column))):
                totals[half] = e.let(tirx.call_llvm_pure_intrin("float32x16", "llvm.fma", weights, factor, totals[half]))
        for half, total in enumerate(totals):
            e.store(a.sums, total, at + half * LANES, lanes=LANES)


def _weights(a: Any, how: Any, row: Any, column: Any) -> list[Any]:
    """One load of weights as float32: for bfloat16 those of even outputs, then those of odd ones."""
    value = e.load(a.weight, row, column, lanes=LANES)
    return [value] if how.dtype == "float32" else e.upcast_pairs(value, LANES)


def _finished(a: Any, how: Any, at: Any) -> Any:
    """The sums of one load of weights, in the order of the outputs."""
    if how.dtype == "float32":
        return e.load(a.sums, at, lanes=LANES)
    even, odd = (e.let(e.load(a.sums, at + half * LANES, lanes=LANES)) for half in range(2))
    return e.shuffle(even, odd, [lane + 16 * half for lane in range(LANES) for half in range(2)])
