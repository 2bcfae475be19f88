"""y = x Wᵀ + bias for many rows of x: vectorised over those rows, so that one kernel serves every structure of W.

Rows of x are taken in panels of `vectors` registers, packed once a call as [column][row]: one column of a panel is then contiguous. A group is r rows
of W that keep the same columns (r = 1: unstructured). For each kept column of a group the kernel loads the panel's column into
`vectors` registers and does r × `vectors` fused multiply-adds with weights broadcast from memory, or taken from lanes. Finished sums are
transposed in registers, 16 outputs at a time.

Bound by: the FMA rate for r >= 4 (r = 16 reaches 90 % of Zen 4's peak); loads of packed columns from L1 and L2 for r = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.layout import OUTPUTS, Layout, arguments, factors, pack_rows, pairs
from sparsify_compiler.codegen.vectors import AVX512, Vectors

WIDEST = 16     # lanes


@dataclass(frozen=True)
class Panel:
    """How: `vectors` registers of x rows at a time, on torch's threads or on the caller's alone."""

    layout: Layout
    vectors: int
    parallel: bool
    dot: bool = False    # multiply bfloat16 pairs with AVX512_BF16, or BFDOT of Arm: x stays bfloat16 when packed
    cut_for: Vectors = AVX512
    most: int = OUTPUTS  # rows of a group whose sums are in registers at a time
    name = "panel"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K], values, columns, pointers, bias, y [M, N])."""
        return e.function("main", lambda: _body(self), self.cut_for)

    @property
    def packed_dtype(self) -> str:
        return "uint16" if self.dot else "float32"

    @property
    def rows(self) -> int:
        return self.cut_for.lanes * self.vectors


def _body(how: Panel) -> None:
    a = arguments(how.layout)
    panels = e.floordiv(a.M + (how.rows - 1), how.rows)
    packed = e.scratch(panels * (a.K + 1) * how.rows, how.packed_dtype)
    pack_rows(a, packed, panels, how.vectors, how.parallel)
    strips = e.let(e.floordiv(a.N + (OUTPUTS - 1), OUTPUTS))
    outputs = e.let(e.floordiv(a.bias.shape[0], e.maximum(strips, 1))) if how.cut_for != AVX512 else None
    with e.loop(panels * strips, parallel=how.parallel) as task:
        panel, strip = e.let(e.floordiv(task, strips)), e.let(e.floormod(task, strips))
        with e.llvm(how.cut_for.dot) if how.dot else nullcontext():
            _strip(a, how, packed, panel, strip, outputs)


def _strip(a: Any, how: Panel, packed: Any, panel: Any, strip: Any, outputs: Any) -> None:
    """OUTPUTS outputs of all rows of one panel. `outputs` is as many, which LLVM does not see: unrolled, a loop keeps finished sums in registers."""
    r, start, width = how.layout.r, e.let(panel * (a.K + 1) * how.rows), e.lanes()

    def put(row: Any, value: Any) -> None:
        e.store_tail(a.y, value, OUTPUTS, row, strip * OUTPUTS, a.N)

    if r == OUTPUTS == how.most:
        sums = _group(a, how, packed, start, strip, strip * OUTPUTS, 0, r)
        for v in range(how.vectors):
            turn(a, panel * how.rows + v * width, [row[v].get() for row in sums], put)
        return
    parts, rows = 2 if width == WIDEST else 1, min(r, how.most)     # an array on the stack is no larger than half of the finished sums of the widest
    finished = [[e.stack(OUTPUTS // parts * width, "float32") for _ in range(parts)] for _ in range(how.vectors)]
    for half in range(parts):
        with e.loop(OUTPUTS // parts // rows if parts > 1 else e.floordiv(outputs, rows)) as i:
            group = strip * (OUTPUTS // r) + half * (OUTPUTS // parts // r) + (i if rows == r else e.floordiv(i, r // rows))
            part = 0 if rows == r else e.let(e.floormod(i, r // rows) * rows)
            _keep(how, finished, half, i * rows, _group(a, how, packed, start, group, group * r + part, part, rows))
    for v in range(how.vectors):
        lines = [e.load(part, i * width, lanes=width) for part in finished[v] for i in range(OUTPUTS // parts)]
        turn(a, panel * how.rows + v * width, lines, put)


def _keep(how: Panel, finished: Any, half: int, first: Any, sums: list[list[e.Register]]) -> None:
    """Sums of outputs from number `first` of a half on, where they are turned from."""
    for row, registers in enumerate(sums):
        for v, register in enumerate(registers):
            e.store(finished[v][half], register.get(), (first + row) * e.lanes(), lanes=e.lanes())


def _group(a: Any, how: Panel, packed: Any, start: Any, group: Any, output: Any, part: Any, rows: int) -> list[list[e.Register]]:
    """The sums of some rows of one group, from number `part` on, which is `output`: [row][vectors] registers."""
    unroll, width = how.layout.unroll if rows * how.vectors < 8 else how.layout.step, e.lanes()
    first, last = e.let(e.load(a.pointers, group)), e.let(e.load(a.pointers, group + 1))
    partial = [[[e.Register(width, e.broadcast(e.load(a.bias, output + row) if u == 0 else e.zero(), width)) for _ in range(how.vectors)]
                for row in range(rows)] for u in range(_sets(how, unroll))]

    def column(u: int, v: int, registers: int = 1) -> Any:
        """The packed column of this step's place u."""
        at = start + e.cast("int32", e.load(a.columns, first + j * unroll + u)) * how.rows
        return e.let(e.load(packed, at + v * width, lanes=registers * width))

    def both(u: int) -> list[Any]:
        """The packed columns of places 2u and 2u + 1, rows in words of both."""
        if how.cut_for.by_element:      # two registers of words are one of each column
            return [word for v in range(0, how.vectors, 2) for word in e.interleave(column(2 * u, v, 2), column(2 * u + 1, v, 2), 2 * width)]
        return [e.let(e.pair(column(2 * u, v), column(2 * u + 1, v), width)) for v in range(how.vectors)]

    with e.loop(e.floordiv(last - first, unroll)) as j:
        weight = (pairs if how.dot else factors)(a, how.layout, first + j * unroll, unroll, part, rows)
        for u in range(unroll // 2 if how.dot else unroll):
            sums = partial[u % len(partial)]
            inputs = both(u) if how.dot else [column(u, v) for v in range(how.vectors)]
            for row, registers in enumerate(sums):
                factor = weight(u, row)
                for v, register in enumerate(registers):
                    if how.dot:
                        register.set(factor(register.get(), inputs[v]))
                    else:
                        register.multiply_add(factor, inputs[v])
    for row in range(rows):
        for v in range(how.vectors):
            for others in partial[1:]:
                partial[0][row][v].set(partial[0][row][v].get() + others[row][v].get())
    return partial[0]


def _sets(how: Panel, unroll: int) -> int:
    """How often the sums of a group are in registers. Of two columns that are read together one set is enough, where registers are short."""
    if how.dot:
        return 1 if how.cut_for.by_element else unroll // 2
    return 1 if how.cut_for != AVX512 and unroll == how.layout.step else unroll


def turn(a: Any, row: Any, sums: list[Any], put: Callable[[Any, Any], None]) -> None:
    """put(row + i, vector of sums[j][i] for all j) for the rows of x that y has, of a register."""
    columns, half_rows = e.turn([e.let(value) for value in sums]), e.lanes() // 2
    halves = [e.stack(half_rows * OUTPUTS, "float32") for _ in range(2)]
    for i, column in enumerate(columns):
        e.store(halves[i // half_rows], column, i % half_rows * OUTPUTS, lanes=OUTPUTS)
    for first, half in zip((row, row + half_rows), halves, strict=True):
        with e.loop(e.maximum(e.minimum(a.M - first, half_rows), 0)) as i:
            put(first + i, e.load(half, i * OUTPUTS, lanes=OUTPUTS))
