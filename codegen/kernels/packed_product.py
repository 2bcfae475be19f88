"""y = x Wᵀ + bias over the kept places of W, values read where training keeps them; x comes in packed columns (pack_columns.py).

W is groups of r outputs that keep the same columns: blocks of r × 1, rows of any mask for r = 1. Nothing is laid out for it: `values` is the
parameter itself, so that no step of an optimizer is followed by repacking. With `order`, value number j is values[order[j]]: the transposed weight
reads the same parameter in its own order (SparseProp, arXiv:2302.04852, keeps one copy too, and scatters instead).

A task is a panel of rows times 16 outputs. Vectors run along rows of x: for each kept column of a group its rows are loaded and multiplied with the
group's weights, broadcast. Finished sums are transposed in registers.

Bound by: loads for r = 1, nine for eight multiply-adds, of columns that lie in L2; the FMA rate from r = 4 on.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from sparsify_compiler.codegen import emit as e

OUTPUTS = 16                                    # of a task
TOGETHER = {1: 8, 2: 8, 4: 4, 8: 2}             # registers of rows at a time, by outputs at a time: at most 16 sums


@dataclass(frozen=True)
class PackedProduct:
    """How: outputs of a group; rows of a panel, a multiple of 16; dtype of the columns; are values read in an order of their own; is there a bias."""

    r: int
    panel: int
    index: str
    order: bool
    bias: bool
    name = "packed_product"

    def compute(self) -> Any:
        """f(packed [panels, columns, panel], values [S * r], (order [S * r],) columns [S], pointers [groups + 1], (bias [N],) y [M, N])."""
        return e.function("main", lambda: _body(self))

    @property
    def rows(self) -> int:
        """Outputs whose sums are in registers at a time: a power of two that divides r."""
        return max(size for size in TOGETHER if self.r % size == 0)


def _body(how: PackedProduct) -> None:
    a = SimpleNamespace(M=e.int32(), N=e.int32())
    panels = e.int32()
    a.packed = e.argument((panels, e.int32(), how.panel), "float32")
    a.values = e.argument((e.int32(),), "float32")
    a.order = e.argument((e.int32(),), "int32") if how.order else None
    a.index, a.pointers = e.argument((e.int32(),), how.index), e.argument((e.int32(),), "int32")
    a.bias = e.argument((a.N,), "float32") if how.bias else None
    a.y = e.argument((a.M, a.N), "float32")
    registers = how.panel // e.lanes()
    vectors = max(count for count in (1, 2, 4, 8) if registers % count == 0 and count <= TOGETHER[how.rows])
    strips = e.opaque(e.floordiv(a.N + (OUTPUTS - 1), OUTPUTS))
    with e.loop(panels * strips, parallel=True) as number:
        panel, output = e.opaque(e.floordiv(number, strips)), e.opaque(e.floormod(number, strips) * OUTPUTS)
        with e.loop(registers // vectors) as turn:
            _task(how, a, panel, e.opaque(turn * (vectors * e.lanes())), output, vectors)


def _task(how: PackedProduct, a: Any, panel: Any, at: Any, output: Any, vectors: int) -> None:
    """16 outputs of the rows of some registers of a panel, from row number `at` of it on."""
    width, rows = e.lanes(), how.rows
    halves = [[e.stack(OUTPUTS // 2 * width, "float32") for _ in range(2)] for _ in range(vectors)]
    for half in range(2):
        with e.loop(OUTPUTS // 2 // rows) as i:
            mine = e.opaque(output + half * (OUTPUTS // 2) + i * rows)
            with e.when(mine < a.N):
                for row, found in enumerate(_sums(how, a, panel, at, mine, vectors)):
                    for v, register in enumerate(found):
                        e.store(halves[v][half], register.get(), (i * rows + row) * width, lanes=width)
    for v in range(vectors):
        lines = e.transpose([e.let(e.load(part, i * width, lanes=width)) for part in halves[v] for i in range(OUTPUTS // 2)])
        _write(a.y, lines, e.opaque(panel * how.panel + at + v * width), output, a.M, a.N)


def _sums(how: PackedProduct, a: Any, panel: Any, at: Any, output: Any, vectors: int) -> list[list[e.Register]]:
    """Of some outputs of one group: [output][register of rows]."""
    width = e.lanes()
    group, part = e.opaque(e.floordiv(output, how.r)), e.opaque(e.floormod(output, how.r))
    first, last = e.opaque(e.load(a.pointers, group)), e.opaque(e.load(a.pointers, group + 1))
    sums = []
    for i in range(how.rows):
        start = e.zero() if a.bias is None else e.load(a.bias, e.minimum(output + i, a.N - 1))
        sums.append([e.Register(width, e.broadcast(start, width)) for _ in range(vectors)])
    with e.loop(last, start=first) as j:
        column = e.let(e.cast("int32", e.load(a.index, j)))
        inputs = [e.let(e.load(a.packed, panel, column, at + v * width, lanes=width)) for v in range(vectors)]
        for i in range(how.rows):
            place = e.let(j * how.r + part + i)
            weight = e.let(e.broadcast(e.load(a.values, place if a.order is None else e.load(a.order, place)), width))
            for register, value in zip(sums[i], inputs, strict=True):
                register.multiply_add(weight, value)
    return sums


def _write(y: Any, lines: list[Any], row: Any, output: Any, M: Any, N: Any) -> None:
    """16 rows of 16 outputs, where y has such rows and outputs."""
    def direct() -> None:
        for i, line in enumerate(lines):
            e.store(y, line, row + i, output, lanes=OUTPUTS)

    def part() -> None:
        halves = [e.stack(e.lanes() // 2 * OUTPUTS, "float32") for _ in range(2)]
        for i, line in enumerate(lines):
            e.store(halves[i // (e.lanes() // 2)], line, i % (e.lanes() // 2) * OUTPUTS, lanes=OUTPUTS)
        for number, half in enumerate(halves):
            begin = e.opaque(row + number * (e.lanes() // 2))
            with e.loop(e.maximum(e.minimum(M - begin, e.lanes() // 2), 0)) as i, e.loop(e.minimum(N - output, OUTPUTS)) as n:
                e.store(y, e.load(half, i * OUTPUTS + n), begin + i, output + n)

    e.choose(e.both(row + e.lanes() <= M, output + OUTPUTS <= N), direct, part)
