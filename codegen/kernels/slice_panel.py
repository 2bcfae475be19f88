"""y = x Wᵀ + bias for more rows of x than a weight was laid out for (gemv.py): vectorised over those rows, on the same layout.

Rows of x are taken in panels of `vectors` × 16, packed once a call as [column][row] (see panel.py). A task is a slice of 16 outputs for one panel:
for each kept weight, which is broadcast from memory, it does `vectors` fused multiply-adds.

It is there so that a layer compiled for one row runs any number of them: from four rows on panel.py is up to 1.1 times as fast on large weights, and
1.8 times on small ones, whose outputs it computes one by one.

Bound by: loads of packed columns from L1 and L2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.gemv import ahead, next_columns, weights, write
from sparsify_compiler.codegen.kernels.layout import pack_rows
from sparsify_compiler.codegen.kernels.panel import turn
from sparsify_compiler.codegen.kernels.slice_layout import LANES, Arguments, SliceLayout, arguments
from sparsify_compiler.codegen.vectors import AVX512, Vectors

HALF = LANES // 2   # outputs whose finished sums fit into one array on the stack
SUMS = 16           # registers of sums at once
UNIT = 2            # steps that are decoded together
CHUNK = 64          # steps whose columns and weights stay in L1


@dataclass(frozen=True)
class SlicePanel:
    """How: `vectors` registers of x rows at a time (1, 2 or 4), on torch's threads."""

    layout: SliceLayout
    vectors: int
    cut_for: Vectors = AVX512
    name = "slice_panel"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K], values, codes, pointers, order, shares, bias, y [M, N])."""
        return e.function("main", lambda: _body(self), self.cut_for)

    @property
    def rows(self) -> int:
        """Of x in a panel."""
        return self.cut_for.lanes * self.vectors


def _body(how: SlicePanel) -> None:
    a = arguments(how.layout)
    panels = e.opaque(e.floordiv(a.M + (how.rows - 1), how.rows))
    packed = e.scratch(panels * (a.K + 1) * how.rows, "float32")
    pack_rows(a, packed, panels, how.vectors, parallel=True)
    slices = e.opaque(e.floordiv(a.N + (LANES - 1), LANES))
    with e.loop(panels * slices, parallel=True) as task:
        panel, number = e.opaque(e.floordiv(task, slices)), e.opaque(e.floormod(task, slices))
        _slice(a, how, packed, panel, number)


def _slice(a: Arguments, how: SlicePanel, packed: Any, panel: Any, number: Any) -> None:
    """16 outputs of all rows of one panel."""
    width, together = e.lanes(), min(LANES, min(SUMS, e.vectors().count // 2) // how.vectors)
    finished = [[e.stack(HALF * width, "float32") for _ in range(2)] for _ in range(how.vectors)]
    for lane in range(0, LANES, together):
        for o, row in enumerate(_sums(a, how, packed, panel, number, lane, together)):
            half, place = divmod(lane + o, HALF)
            for v, total in enumerate(row):
                e.store(finished[v][half], total.get(), place * width, lanes=width)

    def put(row: Any, value: Any) -> None:
        write(a, how.layout, value, row, number)

    for v in range(how.vectors):
        turn(a, panel * how.rows + v * width, [e.load(half, i * width, lanes=width) for half in finished[v] for i in range(HALF)], put)


def _sums(a: Arguments, how: SlicePanel, packed: Any, panel: Any, number: Any, lane: int, together: int) -> list[list[e.Register]]:
    """[together][vectors] registers: the outputs from `lane` on. Columns are decoded in vectors, a chunk of steps ahead, and then read one by one."""
    layout = how.layout
    first, start = e.let(e.load(a.pointers, number)), e.opaque(panel * (a.K + 1) * how.rows)
    steps = e.let(e.load(a.pointers, number + 1) - first)
    columns, values = e.scratch(CHUNK * LANES, "int32"), e.scratch(CHUNK * LANES, "float32")
    column = e.Register(LANES, _all(0), "int32")
    width = e.lanes()
    sums = [[e.Register(width, e.broadcast(e.load(a.bias, number * LANES + lane + o), width)) for _ in range(how.vectors)] for o in range(together)]
    with e.loop(e.floordiv(steps + (CHUNK - 1), CHUNK)) as chunk:
        count = e.let(e.minimum(steps - chunk * CHUNK, CHUNK))
        with e.loop(e.floordiv(count, UNIT)) as j:
            inside = e.let(chunk * CHUNK + j * UNIT)
            ahead(a, layout, first + inside, UNIT)
            for i in range(UNIT):
                at = _place(a, layout, first + inside + i, e.let(inside + i)) if layout.n else next_columns(a, layout, first + inside + i, column)
                e.store(columns, at * _all(how.rows) + e.broadcast(start, LANES), (j * UNIT + i) * LANES, lanes=LANES)
                if layout.step > 1:
                    e.store(values, weights(a, layout, first + inside, i), (j * UNIT + i) * LANES, lanes=LANES)
        begin = e.let(first + chunk * CHUNK)
        with e.loop(count) as j:
            source, start_of = (values, j * LANES) if layout.step > 1 else (a.values, (begin + j) * LANES)
            factors = e.broadcasts(source, start_of + lane, together)
            for o, row in enumerate(sums):
                at = e.let(e.load(columns, j * LANES + lane + o))
                weight = factors(o)
                for v, total in enumerate(row):
                    total.multiply_add(weight, e.load(packed, at + v * width, lanes=width))
    return sums


def _place(a: Arguments, layout: SliceLayout, step: Any, inside: Any) -> Any:
    """The columns of a step of places, number `inside` of its slice; K behind the last input."""
    each = 32 // layout.bits
    word = e.load(a.codes, e.floordiv(step, each) * LANES, lanes=LANES)
    place = (word >> e.broadcast(e.floormod(inside, each) * layout.bits, LANES)) & _all((1 << layout.bits) - 1)
    return e.let(e.minimum(place + e.broadcast(e.floordiv(inside, layout.n) * layout.m, LANES), e.broadcast(a.K, LANES)))


def _all(value: int) -> Any:
    return e.broadcast(e.constant(value, "int32"), LANES)
