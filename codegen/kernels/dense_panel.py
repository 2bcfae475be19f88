"""y = x Wᵀ + bias, dense, for any number of rows of x: panels of some registers of outputs, some rows of x at a time.

A task is a panel of outputs and a run of rows. Block of inputs by block of inputs, which stays in L1, the tile × `vectors` sums of some rows are read
from where they were left, get the products, each a number of x in all lanes with a vector of weights, and are written back; the last block finishes
them. Where weights do not lie in panels, a block of them is copied into one first, which many rows pay for. (Goto and van de Geijn, Anatomy of
High-Performance Matrix Multiplication, 2008.)

Bound by: the FMA rate from some 16 rows on; below, the bandwidth at which W arrives.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.finish import NOTHING, Finish
from sparsify_compiler.codegen.vectors import AVX512, Vectors

SCALAR = Path(__file__).with_name("scalar.ll")
TILES = {16: (6, 4), 8: (6, 2), 4: (5, 4)}  # by lanes: rows of x, and vectors of outputs, whose sums are in registers
BLOCK = 128         # inputs: a panel's weights of a block take 32 KiB of L1
RUN = 192           # rows of a task, at most: their sums stay in L2
SPLIT = 24          # rows of a run from which rows are divided among threads rather than outputs


@dataclass(frozen=True)
class DensePanel:
    """How: work split for this many threads (1: on the caller's alone), and what follows the sums.

    layout  of W: "panels" [panels, K, width of a panel], filled up with zeros; "inputs" [K, W], a multiple of that width; or "outputs" [N, K]. Of the
            last two bfloat16 comes as int32 words of two
    given, dtype, out   of x, of W, and of y (and other): "float32" or "bfloat16"
    """

    layout: str
    workers: int
    finish: Finish = NOTHING
    given: str = "float32"
    dtype: str = "float32"
    out: str = "float32"
    cut_for: Vectors = AVX512
    name = "dense_panel"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K], weight, bias [N, up to a multiple of a panel's width], (other like y,) y [M, N])."""
        return e.function("main", lambda: _body(self), self.cut_for)

    @property
    def width(self) -> int:
        """Outputs of a panel."""
        return width_of(self.cut_for)


def width_of(vectors: Vectors) -> int:
    """Outputs of a panel."""
    return TILES[vectors.lanes][1] * vectors.lanes


def _body(how: DensePanel) -> None:
    a = SimpleNamespace(M=e.int32(), N=e.int32(), K=e.int32())
    a.x = e.argument((a.M, a.K), how.given)
    shape = {"panels": (e.int32(), a.K, how.width), "inputs": (a.K, e.int32()), "outputs": (a.N, e.int32())}[how.layout]
    a.weight = e.argument(shape, "float32" if how.dtype == "float32" else "int32")
    a.bias = e.argument((e.int32(),), "float32")
    a.other = e.argument((a.M, a.N), how.out) if how.finish.add else None
    a.y = e.argument((a.M, a.N), how.out)
    tile, _ = TILES[e.lanes()]
    panels = e.opaque(tirx.truncdiv(a.N + (how.width - 1), how.width))
    share = how.workers if how.workers > 1 else 1
    runs = e.opaque(tirx.truncdiv(a.M + (RUN * share - 1), RUN * share) * e.either(SPLIT * share <= a.M, share, 1))
    rows = e.opaque(tirx.truncdiv(tirx.truncdiv(a.M + (runs - 1), e.maximum(runs, 1)) + (tile - 1), tile) * tile)
    with e.loop(runs * panels, parallel=how.workers > 1) as task, e.llvm(SCALAR.read_text()):
        run = e.opaque(tirx.truncdiv(task, panels))
        first, panel = e.opaque(run * rows), e.opaque(task - run * panels)
        count = e.opaque(e.minimum(a.M - first, rows))
        with e.when(count > 0):
            _panel(how, a, panel, first, count)


def _panel(how: DensePanel, a: Any, panel: Any, first: Any, count: Any) -> None:
    """A panel of outputs for `count` rows from `first` on."""
    tile, _ = TILES[e.lanes()]
    p = SimpleNamespace(panel=panel, column=e.opaque(panel * how.width), held=e.scratch(RUN * how.width, "float32"))
    p.weights = a.weight if how.layout == "panels" else e.scratch(BLOCK * how.width, "float32")
    p.whole = p.column + how.width <= a.N
    blocks = e.opaque(e.maximum(tirx.truncdiv(a.K + (BLOCK - 1), BLOCK), 1))
    with e.loop(blocks) as block:
        p.start = e.opaque(block * BLOCK)
        p.inputs = e.opaque(e.minimum(a.K - p.start, BLOCK))
        p.begins, p.ends = tirx.EQ(block, 0), tirx.EQ(block, blocks - 1)
        if how.layout != "panels":
            _copy(how, a, p)
        whole = e.opaque(tirx.truncdiv(count, tile))
        with e.loop(whole) as number:
            _rows(how, a, p, first, e.opaque(number * tile), tile)
        rest = e.opaque(count - whole * tile)
        done = e.opaque(whole * tile)
        for size in (4, 2, 1):
            with e.when((rest & size) > 0):
                _rows(how, a, p, first, e.opaque(done + (rest & (7 & ~(2 * size - 1)))), size)


def _rows(how: DensePanel, a: Any, p: Any, first: Any, at: Any, count: int) -> None:
    """The products of a block of inputs for `count` rows of a run, from its row `at` on."""
    lanes, vectors = e.lanes(), TILES[e.lanes()][1]
    rows = [e.opaque(first + at + i) for i in range(count)]
    sums = [[e.Register(lanes, e.broadcast(e.zero(), lanes)) for _ in range(vectors)] for _ in rows]
    held = [e.opaque((at + i) * how.width) for i in range(count)]

    def begin() -> None:
        for v in range(vectors):
            bias = e.let(e.load(a.bias, p.column + v * lanes, lanes=lanes))
            for registers in sums:
                registers[v].set(bias)

    def go_on() -> None:
        for place, registers in zip(held, sums, strict=True):
            for v, register in enumerate(registers):
                register.set(e.load(p.held, place + v * lanes, lanes=lanes))

    e.choose(p.begins, begin, go_on)
    _multiply(how, a, p, rows, sums)

    def keep() -> None:
        for place, registers in zip(held, sums, strict=True):
            for v, register in enumerate(registers):
                e.store(p.held, register.get(), place + v * lanes, lanes=lanes)

    e.choose(p.ends, lambda: _finish(how, a, p, rows, held, sums), keep)


def _multiply(how: DensePanel, a: Any, p: Any, rows: list[Any], sums: list[list[e.Register]]) -> None:
    lanes, vectors = e.lanes(), TILES[e.lanes()][1]

    def add(k: Any, number: Any) -> None:
        """One input: number(row) is x of it."""
        weights = [_weight(how, p, k, v) for v in range(vectors)]
        for i, registers in enumerate(sums):
            factor = e.let(e.broadcast(number(i), lanes))
            for register, weight in zip(registers, weights, strict=True):
                register.multiply_add(weight, factor)

    done: Any = 0
    if e.vectors().by_element:
        steps = e.opaque(tirx.truncdiv(p.inputs, lanes))
        with e.loop(steps) as step:
            inputs = [e.let(e.read_float(a.x, row, p.start + step * lanes, lanes=lanes)) for row in rows]
            for i in range(lanes):
                add(step * lanes + i, lambda row, i=i: e.lane(inputs[row], i))
        done = e.opaque(steps * lanes)
    with e.loop(p.inputs, start=done) as k:
        add(k, lambda row: e.read_float(a.x, rows[row], p.start + k))


def _weight(how: DensePanel, p: Any, k: Any, v: int) -> Any:
    """A vector of the weights of an input of the block."""
    lanes = e.lanes()
    if how.layout == "panels":
        return e.let(e.load(p.weights, p.panel, p.start + k, v * lanes, lanes=lanes))
    return e.let(e.load(p.weights, k * how.width + v * lanes, lanes=lanes))


def _copy(how: DensePanel, a: Any, p: Any) -> None:
    """A block of inputs of the panel's weights, as they would lie in panels. Outputs past the last repeat it: they are not stored."""
    lanes, halves = e.lanes(), 1 if how.dtype == "float32" else 2   # numbers of a word

    def numbers(words: Any) -> list[Any]:
        return [words] if halves == 1 else e.upcast_pairs(words, lanes)

    if how.layout == "inputs":
        with e.loop(p.inputs) as k, e.loop(how.width // (lanes * halves)) as v:
            at = e.opaque(v * (lanes * halves))
            found = numbers(e.let(e.load(a.weight, p.start + k, tirx.truncdiv(p.column, halves) + v * lanes, lanes=lanes)))
            value = found[0] if halves == 1 else e.shuffle(*found, [lane + lanes * half for lane in range(lanes) for half in range(2)])
            e.store(p.weights, value, k * how.width + at, lanes=lanes * halves)
        return
    step = lanes * halves
    whole = e.opaque(tirx.truncdiv(p.inputs, step))
    with e.loop(how.width // lanes) as v:
        rows = [e.opaque(e.minimum(p.column + v * lanes + i, a.N - 1)) for i in range(lanes)]
        with e.loop(whole) as chunk:
            first = e.opaque(tirx.truncdiv(p.start, halves) + chunk * lanes)
            lines = [numbers(e.let(e.load(a.weight, row, first, lanes=lanes))) for row in rows]
            for half in range(halves):
                for i, line in enumerate(e.transpose([e.let(line[half]) for line in lines])):
                    e.store(p.weights, line, (chunk * step + i * halves + half) * how.width + v * lanes, lanes=lanes)
        if halves == 1:
            with e.loop(p.inputs, start=whole * lanes) as k:
                for i, row in enumerate(rows):
                    e.store(p.weights, e.load(a.weight, row, p.start + k), k * how.width + v * lanes + i)


def _finish(how: DensePanel, a: Any, p: Any, rows: list[Any], held: list[Any], sums: list[list[e.Register]]) -> None:
    """y of these rows. Sums go by way of memory, so that what follows, which may be long, is written once."""
    lanes, vectors = e.lanes(), TILES[e.lanes()][1]
    for place, registers in zip(held, sums, strict=True):
        for v, register in enumerate(registers):
            e.store(p.held, register.get(), place + v * lanes, lanes=lanes)

    def one(i: Any, v: Any, whole: bool) -> None:
        row, at = e.opaque(rows[0] + i), e.opaque(v * lanes)
        column, value = e.opaque(p.column + at), e.let(e.load(p.held, held[0] + i * how.width + at, lanes=lanes))
        if whole:
            other = None if a.other is None else e.read_float(a.other, row, column, lanes=lanes)
            return e.write_float(a.y, how.finish(value, other), row, column, lanes=lanes)
        other = None if a.other is None else e.load_tail(a.other, lanes, row, column, a.N)
        return e.store_tail(a.y, how.finish(value, other), lanes, row, column, a.N)

    def all_of(whole: bool) -> None:
        with e.loop(len(rows)) as i, e.loop(vectors if whole else tirx.truncdiv(a.N - p.column + (lanes - 1), lanes)) as v:
            one(i, v, whole)

    e.choose(p.whole, lambda: all_of(True), lambda: all_of(False))
