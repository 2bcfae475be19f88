"""y = x Wᵀ + bias for many rows of x and any structure of W: vectors run along rows of x, and W comes in strips of slices (strip_layout.py).

A worker takes a tile of some registers of rows of x and some strips. Block of columns by block of columns it packs the tile's x as [column][row] and
goes through the strips' slices: the tile × SLICE registers of a slice's sums are read from memory, get the products of the block's columns and are
written back; with unstructured weights at density 0.1 that is a dozen columns a visit. At last the sums are transposed in registers, 16
outputs at a time.

Where columns are pairs of inputs (2:4 in bfloat16), a step multiplies both by one instruction.

Bound by: loads for r = 1, five for every four multiply-adds (from L1, a core of Sapphire Rapids class does 1.2 of those a cycle, not 2), and sums
that go to L2 and back between blocks, an eighth of the time at density 0.1; from r = 4 on the FMA rate, of which three quarters are reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.finish import NOTHING, Finish
from sparsify_compiler.codegen.kernels.layout import OUTPUTS
from sparsify_compiler.codegen.kernels.share import share
from sparsify_compiler.codegen.kernels.strip_layout import PAIRS, QUAD, SLICE, TILES, StripLayout
from sparsify_compiler.codegen.vectors import AVX512, Vectors

SCALAR, DOT = (Path(__file__).with_name(f"{name}.ll") for name in ("scalar", "dot_bf16"))
SHORT = ("", "relu")    # activations that may be written out 16 times: of longer ones the code would take minutes to compile
TOGETHER = 2    # strips that a worker takes through all blocks at once


@dataclass(frozen=True)
class StripPanel:
    """How: work split for this many threads (1: on the caller's alone), and what follows the sums."""

    layout: StripLayout
    workers: int
    finish: Finish = NOTHING
    cut_for: Vectors = AVX512
    name = "strip_panel"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K], values, columns, pointers, visits, starts, strips, bias, (other like y,) y [M, N])."""
        return e.function("main", lambda: _body(self), self.cut_for)

    @property
    def tile(self) -> int:
        """Registers of rows of x at a time."""
        return TILES[self.cut_for.lanes]


def _arguments(how: StripPanel) -> Any:
    layout = how.layout
    a = SimpleNamespace(M=e.int32(), N=e.int32(), K=e.int32(), T=e.int32())
    a.x = e.argument((a.M, a.K), layout.dtype)
    a.values, a.columns = e.argument((e.int32(),), layout.weight), e.argument((e.int32(),), layout.index)
    a.pointers, a.visits, a.starts = (e.argument((e.int32(),), "int32") for _ in range(3))
    a.strips, a.bias = e.argument((a.T,), "int32"), e.argument((e.int32(),), "float32")
    a.other = e.argument((a.M, a.N), layout.dtype) if how.finish.add else None
    a.y = e.argument((a.M, a.N), layout.dtype)
    return a


def _body(how: StripPanel) -> None:
    a, layout, workers = _arguments(how), how.layout, how.workers
    a.blocks = e.opaque(e.maximum(tirx.truncdiv(a.K + (layout.span - 1), layout.span), 1))
    a.registers, strips = e.opaque(tirx.truncdiv(a.M + (e.lanes() - 1), e.lanes())), e.opaque(a.T - 1)
    a.tiles = e.opaque(tirx.truncdiv(a.registers + (how.tile - 1), how.tile))
    text = SCALAR.read_text() + (DOT.read_text() if layout.paired else "")
    with e.loop(workers, parallel=workers > 1) as me, e.llvm(text):
        packed = e.scratch((layout.block + 1) * (how.tile * e.lanes()), "int32" if layout.paired else "float32")
        s = share(a.tiles, strips, workers, me)
        with e.loop(e.opaque(s.own + s.left)) as number:
            alone = number < s.own
            t = _tile(a, packed, e.opaque(e.either(alone, s.first + number, s.rest)))
            first, last = e.opaque(e.either(alone, 0, s.begin)), e.opaque(e.either(alone, strips, s.end))
            with e.loop(tirx.truncdiv(last - first + (TOGETHER - 1), TOGETHER)) as turn:
                begin = e.opaque(first + turn * TOGETHER)
                _strips(how, a, t, begin, e.opaque(e.minimum(begin + TOGETHER, last)))


def _tile(a: Any, packed: Any, number: Any) -> Any:
    """Some registers of rows: as many as in the other tiles, or one more or less."""
    first = e.opaque(tirx.truncdiv(number * a.registers, a.tiles))
    count = e.opaque(tirx.truncdiv((number + 1) * a.registers, a.tiles) - first)
    return SimpleNamespace(packed=packed, row=e.opaque(first * e.lanes()), count=count, width=e.opaque(count * e.lanes()))


def _strips(how: StripPanel, a: Any, t: Any, begin: Any, end: Any) -> None:
    """The outputs of some strips for a tile."""
    t.output = e.opaque(e.load(a.strips, begin))
    outputs = e.opaque(e.load(a.strips, end) - t.output)
    t.held = e.scratch(outputs * (how.tile * e.lanes()), "float32")
    with e.loop(a.blocks) as block:
        _pack(how, a, t, block)
        with e.loop(end, start=begin) as strip:
            at, before = e.let(strip * a.blocks + block), e.opaque(e.load(a.strips, strip) - t.output)
            for count in range(1, how.tile + 1):
                with e.when(tirx.EQ(t.count, count)), e.loop(e.load(a.starts, at + 1), start=e.load(a.starts, at)) as visit:
                    _visit(how, a, t, count, block, before, visit)
    with e.loop(t.count) as v, e.loop(tirx.truncdiv(outputs, OUTPUTS)) as group:
        _write(how, a, t, v, e.opaque(group * OUTPUTS))


def _visit(how: StripPanel, a: Any, t: Any, count: int, block: Any, before: Any, visit: Any) -> None:
    """Add the products of a slice's columns in a block to its sums."""
    layout, width = how.layout, count * e.lanes()
    r, lanes = layout.r, layout.lanes
    outputs = [e.let(before + e.load(a.visits, visit * lanes + lane)) for lane in range(lanes)]
    held = [e.let((outputs[lane] + row) * width) for lane in range(lanes) for row in range(r)]
    sums = [[e.Register(e.lanes(), e.broadcast(e.zero(), e.lanes())) for _ in range(count)] for _ in range(SLICE)]

    def start() -> None:
        for number, registers in enumerate(sums):
            bias = e.let(e.broadcast(e.load(a.bias, t.output + outputs[number // r] + number % r), e.lanes()))
            for register in registers:
                register.set(bias)

    def go_on() -> None:
        for at, registers in zip(held, sums, strict=True):
            for v, register in enumerate(registers):
                register.set(e.load(t.held, at + v * e.lanes(), lanes=e.lanes()))

    e.choose(tirx.EQ(block, 0), start, go_on)
    with e.loop(e.load(a.pointers, visit + 1), start=e.load(a.pointers, visit)) as step:
        weights = _weights(how, a, e.let(step * SLICE))
        for lane in range(lanes):
            column = e.external("int32", "scalar", e.cast("int32", e.load(a.columns, step * lanes + lane)))
            at = e.let(column * width)
            inputs = [e.let(e.load(t.packed, at + v * e.lanes(), lanes=e.lanes())) for v in range(count)]
            for row in range(r):
                weight = weights(lane * r + row)
                for register, value in zip(sums[lane * r + row], inputs, strict=True):
                    if layout.paired:
                        register.set(e.external(register.dtype, "dot_bf16", register.get(), value, weight))
                    else:
                        register.multiply_add(weight, value)
    for at, registers in zip(held, sums, strict=True):
        again = e.opaque(e.external("int32", "scalar", at))  # else the places of all registers are kept on the stack meanwhile
        for v, register in enumerate(registers):
            e.store(t.held, register.get(), again + v * e.lanes(), lanes=e.lanes())


def _weights(how: StripPanel, a: Any, first: Any) -> Callable[[int], Any]:
    """Of the outputs of a slice the i-th one's weight, or pair of them, in all lanes."""
    if not how.layout.paired:
        return e.broadcasts(a.values, first, SLICE)
    return lambda i: e.let(e.broadcast(e.load(a.values, first + i), e.lanes()))


def _pack(how: StripPanel, a: Any, t: Any, block: Any) -> None:
    """Transpose a block of the tile's x, with zeros behind it. Rows past the last repeat it: their sums are not stored."""
    layout, width = how.layout, e.lanes()
    start = e.opaque(block * layout.span)
    columns = e.opaque(e.minimum(a.K - start, layout.span))
    with e.loop(t.count) as v:
        row = e.opaque(t.row + v * width)
        with e.loop(tirx.truncdiv(columns, width)) as chunk:
            first = e.opaque(start + chunk * width)
            lines = [e.let(e.read_float(a.x, e.minimum(row + i, a.M - 1), first, lanes=width)) for i in range(width)]
            _put(how, t, e.opaque(chunk * width), v, e.transpose(lines), lambda made, to: e.store(t.packed, made, to, lanes=width))
        step = QUAD if layout.paired else 1     # a 2:4 weight has whole groups of four inputs
        whole = tirx.truncdiv(columns, width) * width
        with e.loop(tirx.truncdiv(columns - whole, step)) as rest, e.loop(width) as i:
            first = e.opaque(whole + rest * step)
            line = [e.let(e.read_float(a.x, e.minimum(row + i, a.M - 1), start + first + j)) for j in range(step)]
            _put(how, t, first, v, line, lambda made, to, i=i: e.store(t.packed, made, to + i))  # type: ignore[misc]
        zeros = e.broadcast(e.constant(0, "int32") if layout.paired else e.zero(), width)
        e.store(t.packed, zeros, layout.block * t.width + v * width, lanes=width)


def _put(how: StripPanel, t: Any, first: Any, v: Any, inputs: Sequence[Any], store: Callable[[Any, Any], None]) -> None:
    """Neighbouring inputs of the block from number `first` on to where packed x has them, or their pairs."""
    if not how.layout.paired:
        for k, value in enumerate(inputs):
            store(value, (first + k) * t.width + v * e.lanes())
        return
    lanes = e.lanes() if len(inputs) > QUAD else 1
    for quad in range(len(inputs) // QUAD):
        column = e.opaque(tirx.truncdiv(first, QUAD) + quad)
        for number, (low, high) in enumerate(PAIRS):
            made = e.pair_upper(inputs[quad * QUAD + low], inputs[quad * QUAD + high], lanes)
            store(made, (column * len(PAIRS) + number) * t.width + v * e.lanes())


def _write(how: StripPanel, a: Any, t: Any, v: Any, output: Any) -> None:
    """Transpose the sums of 16 outputs into y, where it has such rows and outputs, with what follows."""
    source, first = e.opaque(output * t.width + v * e.lanes()), e.opaque(t.output + output)
    lines = e.turn([e.let(e.load(t.held, source + i * t.width, lanes=e.lanes())) for i in range(OUTPUTS)])
    row = e.opaque(t.row + v * e.lanes())

    def direct() -> None:
        for i, line in enumerate(lines):
            added = None if a.other is None else e.read_float(a.other, row + i, first, lanes=OUTPUTS)
            e.write_float(a.y, how.finish(line, added), row + i, first, lanes=OUTPUTS)

    def part() -> None:
        halves = [e.stack(e.lanes() // 2 * OUTPUTS, "float32") for _ in range(2)]
        for i, line in enumerate(lines):
            e.store(halves[i // (e.lanes() // 2)], line, i % (e.lanes() // 2) * OUTPUTS, lanes=OUTPUTS)
        for number, half in enumerate(halves):
            with e.loop(e.maximum(e.minimum(a.M - row - number * (e.lanes() // 2), e.lanes() // 2), 0)) as i:
                at = e.opaque(row + number * (e.lanes() // 2) + i)
                added = None if a.other is None else e.load_tail(a.other, OUTPUTS, at, first, a.N)
                e.store_tail(a.y, how.finish(e.load(half, i * OUTPUTS, lanes=OUTPUTS), added), OUTPUTS, at, first, a.N)

    if how.finish.activation not in SHORT:
        return part()
    return e.choose(e.both(row + e.lanes() <= a.M, first + OUTPUTS <= a.N), direct, part)
