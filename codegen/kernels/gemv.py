"""y = x Wᵀ + bias for one row of x, or a few, where each output keeps inputs of its own: 16 outputs at a time, one in each lane of a vector.

A step multiplies 16 weights, as they lie in memory, with the inputs that they want. Of any mask a gather (gaps) or 16 single loads (columns) fetch
those from a copy of x in L1.
Where n of every m inputs are kept (places) all 16 are among the same m: one load, and a permutation of its lanes.
Weights are read once, in order, however many rows there are: a slice stays in the caches for the next row.

Bound by: places: the bandwidth at which W arrives. gaps: the gather, 9 cycles for 16 weights on Sapphire Rapids (2.5 ns; with weights from L3 3 ns),
21 on Zen 4, where it is microcode. columns: 11 cycles on Zen 4, most of them for taking the 16 addresses apart; loaded as 16 single words, 15.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen import emit_tiles as t
from sparsify_compiler.codegen.kernels.slice_layout import LANES, SHARES, SKIP, Arguments, SliceLayout, arguments
from sparsify_compiler.codegen.vectors import AVX512, Vectors

GATHER = Path(__file__).with_name("gemv.ll")
SUMS = 4            # of a slice, apart: they hide the latency of an FMA
AHEAD = 32          # vectors of weights: the processor's own prefetching stops at each page, and is late where they come from DRAM


@dataclass(frozen=True)
class Gemv:
    """How: on torch's threads or on the caller's alone."""

    layout: SliceLayout
    parallel: bool
    cut_for: Vectors = AVX512
    name = "gemv"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K], values, codes, pointers, order, shares, bias, y [M, N])."""
        return e.function("main", lambda: _body(self), self.cut_for)


def _body(how: Gemv) -> None:
    a = arguments(how.layout)
    width = e.opaque(padded_width(how.layout, a.K))
    inputs = e.scratch(a.M * width, "float32")
    copy_rows(a, inputs, width)
    if how.parallel:
        with e.loop(SHARES, parallel=True) as share:
            first = e.let(e.load(a.shares, share))
            with e.loop(e.load(a.shares, share + 1) - first) as i:
                _slice(a, how, inputs, width, e.let(first + i))
    else:
        with e.loop(e.floordiv(a.N + (LANES - 1), LANES)) as number:
            _slice(a, how, inputs, width, number)


def padded_width(layout: SliceLayout, inputs: Any) -> Any:
    """Inputs of a row of x with the zeros behind it: one for codes without weight, or as many as the last block and its vectors reach."""
    if not layout.n:
        return e.floordiv(inputs + LANES, LANES) * LANES
    reach = layout.block // layout.n * layout.m
    return e.floordiv(e.floordiv(inputs + (reach - 1), reach) * reach + (2 * LANES - 1), LANES) * LANES


def copy_rows(a: Arguments, inputs: Any, width: Any) -> None:
    """inputs[row * width + column] = x[row, column], zeros behind it."""
    with e.loop(a.M) as m:
        start = e.let(m * width)
        whole = e.let(e.floordiv(a.K, LANES))
        with e.loop(whole) as k:
            e.store(inputs, e.read_float(a.x, m, k * LANES, lanes=LANES), start + k * LANES, lanes=LANES)
        with e.loop(a.K - whole * LANES) as k:
            e.store(inputs, e.read_float(a.x, m, whole * LANES + k), start + whole * LANES + k)
        with e.loop(width - a.K) as k:
            e.store(inputs, e.zero(), start + a.K + k)


def _slice(a: Arguments, how: Gemv, inputs: Any, width: Any, number: Any) -> None:
    """16 outputs of every row."""
    first, last = e.let(e.load(a.pointers, number)), e.let(e.load(a.pointers, number + 1))
    bias = e.let(e.load(a.bias, number * LANES, lanes=LANES))
    with e.loop(a.M) as m:
        sums = [e.Register(LANES, bias if i == 0 else e.broadcast(e.zero(), LANES)) for i in range(SUMS if e.vectors().masked else 2)]
        start = e.opaque(m * width)
        if how.layout.n and e.vectors().masked:
            _places(a, how.layout, inputs, start, first, last, sums)
        else:
            with e.llvm(GATHER.read_text()):
                (_places if how.layout.n else _columns if how.layout.direct else _gaps)(a, how.layout, inputs, start, first, last, sums)
        pairs = [low.get() + high.get() for low, high in zip(sums[::2], sums[1::2], strict=True)]
        total = e.let(pairs[0] if len(pairs) == 1 else pairs[0] + pairs[1])
        write(a, how.layout, total, m, number)


def _gaps(a: Arguments, layout: SliceLayout, inputs: Any, start: Any, first: Any, last: Any, sums: list[e.Register]) -> None:
    column = e.Register(LANES, e.broadcast(e.constant(0, "int32"), LANES), "int32")
    with e.loop(e.floordiv(last - first, layout.block)) as j:
        step = e.let(first + j * layout.block)
        ahead(a, layout, step, layout.block)
        for i in range(layout.block):
            at = next_columns(a, layout, step + i, column)
            gathered = e.external(sums[i].dtype, "gather", t.address(inputs, start), at)
            sums[i % len(sums)].multiply_add(gathered, weights(a, layout, step, i))


def _columns(a: Arguments, layout: SliceLayout, inputs: Any, start: Any, first: Any, last: Any, sums: list[e.Register]) -> None:
    with e.loop(e.floordiv(last - first, layout.block)) as j:
        step = e.let(first + j * layout.block)
        ahead(a, layout, step, layout.block)
        for i in range(layout.block):
            picked = e.external(sums[i].dtype, "pick", t.address(inputs, start), t.address(a.codes, (step + i) * LANES))
            sums[i % len(sums)].multiply_add(picked, weights(a, layout, step, i))


def next_columns(a: Arguments, layout: SliceLayout, step: Any, column: e.Register) -> Any:
    """The columns of a step of gaps or columns; K where there is no weight."""
    code = e.let(e.load(a.codes, step * LANES, lanes=LANES))
    if layout.direct:
        return e.let(e.cast_to("int32", code, LANES))
    column.set(column.get() + e.cast_to("int32", code, LANES))
    return e.let(e.either(code < e.broadcast(e.constant(SKIP, "uint8"), LANES), column.get(), e.broadcast(a.K, LANES)))


def _places(a: Arguments, layout: SliceLayout, inputs: Any, start: Any, first: Any, last: Any, sums: list[e.Register]) -> None:
    each, block = 32 // layout.bits, layout.block
    with e.loop(e.floordiv(last - first, block)) as j:
        step, base = e.let(first + j * block), e.let(start + j * (block // layout.n * layout.m))
        words = [e.let(e.load(a.codes, (e.floordiv(step, each) + w) * LANES, lanes=LANES)) for w in range(block // each)]
        ahead(a, layout, step, block)
        window = None
        for i in range(block):
            if i % layout.n == 0:
                window = _window(inputs, base + i // layout.n * layout.m, layout.m)
            place = words[i // each] >> e.broadcast(e.constant(layout.bits * (i % each), "int32"), LANES)
            sums[i % len(sums)].multiply_add(_pick(window, place, layout.m), weights(a, layout, step, i))


def ahead(a: Arguments, layout: SliceLayout, step: Any, steps: int) -> None:
    """Ask for the weights of `steps` steps, and their codes, that come AHEAD bytes later."""
    for line in range(0, steps, layout.step):
        t.prefetch(a.values, (e.floordiv(step + line, layout.step) + AHEAD) * LANES)
    if not layout.n:
        t.prefetch(a.codes, step * LANES + AHEAD * 16)


def _window(inputs: Any, at: Any, m: int) -> Any:
    """The inputs of a group: in each quarter of a vector where four are enough, or in one; where lanes cannot be picked their address."""
    if not e.vectors().masked:
        return t.address(inputs, at)
    if m > 4:
        return e.let(e.load(inputs, at, lanes=LANES))
    four = e.let(e.load(inputs, at, lanes=4))
    return e.let(e.join([four] * (LANES // 4), 4))


def _pick(window: Any, place: Any, m: int) -> Any:
    """The lane of the window that each lane of `place` names; the instructions of AVX-512 look at the low bits only."""
    if not e.vectors().masked:
        low = e.broadcast(e.constant(3 if m <= 4 else 15, "int32"), LANES)
        return e.external(e.floats(LANES), "gather", window, e.let(place & low))
    name = "vpermilvar.ps.512" if m <= 4 else "permvar.sf.512"
    return e.intrinsic("float32", LANES, f"llvm.x86.avx512.{name}", window, place)


def weights(a: Arguments, layout: SliceLayout, step: Any, ahead: int) -> Any:
    """The 16 float32 weights of step number step + ahead (step is even)."""
    if layout.step == 1:
        return e.load(a.values, (step + ahead) * LANES, lanes=LANES)
    word = e.cast_to("uint32", e.load(a.values, (e.floordiv(step, 2) + ahead // 2) * LANES, lanes=LANES), LANES)
    return (e.upcast_high if ahead % 2 else e.upcast_low)(word, LANES)


def write(a: Arguments, layout: SliceLayout, value: Any, row: Any, number: Any) -> None:
    """y[row, order] = value for the 16 outputs of a slice."""
    if not layout.sorted:
        e.store_tail(a.y, value, LANES, row, number * LANES, a.N)
        return
    rounded = e.stack(LANES, str(a.y.dtype))
    e.write_float(rounded, value, 0, lanes=LANES)
    with e.loop(LANES) as i:
        output = e.let(e.load(a.order, number * LANES + i))
        with e.when(output < a.N):
            e.store(a.y, e.load(rounded, i), row, output)
