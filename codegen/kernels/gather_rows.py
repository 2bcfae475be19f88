"""y = select(x) W + bias for few rows of x, W input by input: rows of W that no row of x selects are never read.

First the scores of x are compared with the limit, and what is selected is written next to each other: its place and its difference from the
centre (whose own part of y lies in the bias), 0 for a row of x that does not select it itself. Then every task goes over the selected rows of W,
eight at a time, and adds them to its own outputs, which stay in L1. Every row of W is a run of whole cache lines for a task, so the processor reads
ahead by itself, and memory is read at the pace of a copy; asking for the next rows by prefetch instructions costs a quarter of that (measured).

Bound by: the bandwidth at which the selected rows of W arrive; the FMA rate from some 8 rows of x on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen import emit_tiles as t
from sparsify_compiler.codegen.kernels.products import LANES, step_of
from sparsify_compiler.codegen.vectors import AVX512, Vectors

PARTS = Path(__file__).with_name("gather.ll")
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
    cut_for: Vectors = AVX512
    name = "gather_rows"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K], limit [1 or M], scale [K], center [K], weight [K, W], bias [W], y [M, N]); W a multiple of 64, N <= W.

        Weights of bfloat16 come as int32 words of two, [K, W / 2].
        """
        return e.function("main", lambda: _body(self), self.cut_for)


def _body(how: GatherRows) -> None:
    M, N, K, W, L = (e.int32() for _ in range(5))
    x, limit = e.argument((M, K), how.dtype), e.argument((L,), "float32")
    scale, center = (e.argument((K if given else e.int32(),), "float32") for given in (how.scaled, how.centered))
    weight, bias = weight_argument(K, how.dtype), e.argument((W,), "float32")
    y = e.argument((M, N), how.dtype)

    inputs = Inputs(partial(read_row, x), M, K, limit, L, scale if how.scaled else None, center if how.centered else None)
    sums = Sums(how.dtype, weight, bias, M, W)
    with e.llvm(PARTS.read_text()):
        count = inputs.select()
    with each_span(W, how.columns, how.parallel) as (start, width):
        sums.add(inputs, count, start, width)
        sums.write(y, N, start, width)


@contextmanager
def each_span(columns: Any, step: int, parallel: bool) -> Iterator[tuple[Any, Any]]:
    """`with each_span(...) as (start, width):` the columns 0 ... columns - 1, `step` of them a task."""
    with e.loop(e.floordiv(columns + (step - 1), step), parallel=parallel) as task:
        start = e.let(task * step)
        yield start, e.let(e.minimum(columns - start, step))


def weight_argument(inputs: Any, dtype: str) -> Any:
    """The next parameter: a weight input by input, [inputs, W], or [inputs, W / 2] int32 words of two bfloat16."""
    return e.argument((inputs, e.int32()), "float32" if dtype == "float32" else "int32")


def read_row(x: Any, m: Any, at: Any, lanes: int) -> Any:
    """Neighbours in a row of a matrix, as float32."""
    return e.read_float(x, m, at, lanes=lanes)


class Chosen:
    """Rows of inputs, what they select written next to each other: `places`, and the `values` of each row from row * stride on."""

    def __init__(self, rows: Any, width: Any) -> None:
        self.rows, self.width, self.stride = rows, width, e.let(width + LANES)
        self.places = e.scratch(self.stride, "int32")
        self.values = e.scratch(rows * self.stride, "float32")


class Inputs(Chosen):
    """Rows of inputs with what selects them: `read(row, at, lanes)` gives their values as float32.

    limit [limits], one for all rows or one a row; scale and center [width], or None
    """

    def __init__(self, read: Callable[[Any, Any, int], Any], rows: Any, width: Any, limit: Any, limits: Any, scale: Any, center: Any) -> None:
        super().__init__(rows, width)
        self._read, self._limit, self._limits, self._scale, self._center = read, limit, limits, scale, center

    def select(self) -> Any:
        """Write down what any row selects; how many that is."""
        found = e.stack(1, "int32")
        e.store(found, tirx.const(0, "int32"), 0)
        whole = e.let(e.floordiv(self.width, LANES))
        with e.loop(whole) as block:
            self._block(found, e.let(block * LANES))
        with e.loop(self.width - whole * LANES) as rest:
            self._one(found, e.let(whole * LANES + rest))
        return e.let(e.load(found, 0))

    def _score(self, m: Any, at: Any, lanes: int) -> tuple[Any, Any]:
        """What is multiplied with W, and its score."""
        value = self._read(m, at, lanes)
        value = e.let(value if self._center is None else value - e.load(self._center, at, lanes=lanes))
        size = e.absolute(value, lanes)
        return value, e.let(size if self._scale is None else size * e.load(self._scale, at, lanes=lanes))

    def _least(self, m: Any) -> Any:
        return e.load(self._limit, e.minimum(m, self._limits - 1))

    def _block(self, found: Any, at: Any) -> None:
        """16 inputs: those that any row selects are taken."""
        union = e.stack(1, "int32")
        e.store(union, tirx.const(0, "int32"), 0)
        with e.loop(self.rows) as m:
            _, score = self._score(m, at, LANES)
            e.store(union, e.load(union, 0) | e.external("int32", "selected", score, self._least(m)), 0)
        mask, count = e.let(e.load(union, 0)), e.let(e.load(found, 0))
        with e.loop(self.rows) as m:
            value, score = self._score(m, at, LANES)
            own = e.external("float32x16", "only", value, e.external("int32", "selected", score, self._least(m)))
            e.builder.evaluate(tirx.call_extern("int32", "compress_values", t.address(self.values, m * self.stride + count), own, mask))
        taken = tirx.call_extern("int32", "compress_places", t.address(self.places, count), at, mask)
        e.store(found, count + taken, 0)

    def _one(self, found: Any, at: Any) -> None:
        """One of the inputs behind the last whole 16: taken always, with 0 for a row that does not select it."""
        count = e.let(e.load(found, 0))
        with e.loop(self.rows) as m:
            value, score = self._score(m, at, 1)
            e.store(self.values, tirx.Select(score < self._least(m), e.zero(), value), m * self.stride + count)
        e.store(self.places, at, count)
        e.store(found, count + 1, 0)


class Sums:
    """Outputs of some rows, summed up in float32, [rows, width] one after the other: `bias` [width] and weights [inputs, width], input by input."""

    def __init__(self, dtype: str, weight: Any, bias: Any, rows: Any, width: Any) -> None:
        self.step = step_of(dtype)  # outputs of one load
        self._weight, self._bias, self.rows, self.width = weight, bias, rows, width
        self._sums = e.scratch(rows * width, "float32")

    def add(self, chosen: Chosen, count: Any, start: Any, width: Any) -> None:
        """All rows times one task's columns of the weights of `count` inputs."""
        with e.loop(self.rows) as m, e.loop(e.floordiv(width, self.step)) as j:
            at = e.let(start + j * self.step)
            for half, value in enumerate(as_read(e.let(e.load(self._bias, at, lanes=self.step)), self.step)):
                e.store(self._sums, value, m * self.width + at + half * LANES, lanes=LANES)
        whole = e.let(e.floordiv(count, TOGETHER))
        with e.loop(whole) as group:
            self._add(chosen, group * TOGETHER, TOGETHER, start, width)
        with e.loop(count - whole * TOGETHER) as rest:
            self._add(chosen, whole * TOGETHER + rest, 1, start, width)

    def _add(self, chosen: Chosen, first: int, together: int, start: Any, width: Any) -> None:
        """`together` inputs from number `first` on: some columns for all rows, while they are in L1, then the next."""
        first = e.let(first)
        places = [e.wide(e.load(chosen.places, first + i)) for i in range(together)]
        near = e.let(tirx.Select(tirx.EQ(self.rows, 1), width, tirx.const(NEAR, "int32")))
        with e.loop(e.floordiv(width + near - 1, near)) as part:
            begin = e.let(start + part * near)
            steps = e.let(e.floordiv(e.minimum(start + width - begin, near), self.step))
            with e.loop(self.rows) as m:
                self._multiply(chosen, e.let(m), first, places, begin, steps)

    def _multiply(self, chosen: Chosen, m: Any, first: Any, places: list[Any], begin: Any, steps: Any) -> None:
        """One row and `steps` loads of the weights of each of these inputs."""
        factors = [e.let(e.broadcast(e.load(chosen.values, m * chosen.stride + first + i), LANES)) for i in range(len(places))]
        with e.loop(steps) as j:
            column, at = e.let(e.floordiv(begin, self.step // LANES) + j * LANES), e.let(m * self.width + begin + j * self.step)
            totals = [e.load(self._sums, at + half * LANES, lanes=LANES) for half in range(self.step // LANES)]
            for row, factor in zip(places, factors, strict=True):
                for half, weights in enumerate(self._weights(row, e.wide(column))):
                    totals[half] = e.let(tirx.call_llvm_pure_intrin("float32x16", "llvm.fma", weights, factor, totals[half]))
            for half, total in enumerate(totals):
                e.store(self._sums, total, at + half * LANES, lanes=LANES)

    def _weights(self, row: Any, column: Any) -> list[Any]:
        """One load of weights as float32: for bfloat16 those of even outputs, then those of odd ones."""
        value = e.load(self._weight, row, column, lanes=LANES)
        return [value] if self.step == LANES else e.upcast_pairs(value, LANES)

    def read(self, m: Any, column: Any) -> list[Any]:
        """The sums of one load of weights, as the weights come."""
        at = e.let(m * self.width + column)
        return [e.let(e.load(self._sums, at + half * LANES, lanes=LANES)) for half in range(self.step // LANES)]

    def write(self, y: Any, columns: Any, start: Any, width: Any) -> None:
        """y[row, column] of a task's columns, as far as y has them."""
        with e.loop(self.rows) as m, e.loop(e.floordiv(width, self.step)) as j:
            column = e.let(start + j * self.step)
            e.store_tail(y, in_order(self.read(m, column)), self.step, m, column, columns)


def as_read(value: Any, step: int) -> list[Any]:
    """The outputs of one load of weights in the order in which these are read: all, or the even ones, then the odd ones."""
    return [value] if step == LANES else [e.let(e.shuffle(value, value, [2 * i + half for i in range(LANES)])) for half in range(2)]


def in_order(halves: list[Any]) -> Any:
    """What was computed of one load of weights, in the order of the outputs."""
    return halves[0] if len(halves) == 1 else e.shuffle(*halves, [lane + LANES * half for lane in range(LANES) for half in range(2)])
