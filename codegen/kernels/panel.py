"""y = x Wᵀ + bias for many rows of x: vectorised over those rows, so that one kernel serves every structure of W.

Rows of x are taken in panels of `vectors` × 16, packed once a call as [column][row]: one column of a panel is then contiguous. A group is
r rows of W that keep the same columns (r = 1: unstructured). For each kept column of a group the kernel loads the panel's column into
`vectors` registers and does r × `vectors` fused multiply-adds with weights broadcast from memory. Finished sums are transposed in registers,
16 rows × 16 outputs at a time.

Bound by: the FMA rate for r >= 4 (r = 16 reaches 90 % of Zen 4's peak); loads of packed columns from L1 and L2 for r = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.layout import LANES, OUTPUTS, Layout, arguments, pack_rows, weights_of

DOT = Path(__file__).with_name("dot_bf16.ll")


@dataclass(frozen=True)
class Panel:
    """How: `vectors` registers of x rows at a time, on torch's threads or on the caller's alone."""

    layout: Layout
    vectors: int
    parallel: bool
    dot: bool = False    # multiply bfloat16 pairs with AVX512_BF16: x stays bfloat16 when packed
    name = "panel"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K], values, columns, pointers, bias, y [M, N])."""
        return e.function("main", lambda: _body(self))

    @property
    def packed_dtype(self) -> str:
        return "uint16" if self.dot else "float32"

    @property
    def rows(self) -> int:
        return LANES * self.vectors


def _body(how: Panel) -> None:
    a = arguments(how.layout)
    panels = e.floordiv(a.M + (how.rows - 1), how.rows)
    packed = e.scratch(panels * (a.K + 1) * how.rows, how.packed_dtype)
    pack_rows(a, packed, panels, how.vectors, how.parallel)
    strips = e.let(e.floordiv(a.N + (OUTPUTS - 1), OUTPUTS))
    with e.loop(panels * strips, parallel=how.parallel) as task:
        panel, strip = e.let(e.floordiv(task, strips)), e.let(e.floormod(task, strips))
        with e.llvm(DOT.read_text()) if how.dot else nullcontext():
            _strip(a, how, packed, panel, strip)


def _strip(a: Any, how: Panel, packed: Any, panel: Any, strip: Any) -> None:
    """OUTPUTS outputs of all rows of one panel."""
    r, start = how.layout.r, e.let(panel * (a.K + 1) * how.rows)

    def put(row: Any, value: Any) -> None:
        e.store_tail(a.y, value, OUTPUTS, row, strip * OUTPUTS, a.N)

    if r == OUTPUTS:
        sums = _group(a, how, packed, start, strip, strip * OUTPUTS)
        for v in range(how.vectors):
            turn(a, panel * how.rows + v * LANES, [row[v].get() for row in sums], put)
        return
    finished = [[e.stack(OUTPUTS // 2 * LANES, "float32") for _ in range(2)] for _ in range(how.vectors)]
    for half in range(2):
        with e.loop(OUTPUTS // 2 // r) as i:
            group = strip * (OUTPUTS // r) + half * (OUTPUTS // 2 // r) + i
            sums = _group(a, how, packed, start, group, group * r)
            for row in range(r):
                for v in range(how.vectors):
                    e.store(finished[v][half], sums[row][v].get(), (i * r + row) * LANES, lanes=LANES)
    for v in range(how.vectors):
        turn(a, panel * how.rows + v * LANES, [e.load(half, i * LANES, lanes=LANES) for half in finished[v] for i in range(OUTPUTS // 2)], put)


def _group(a: Any, how: Panel, packed: Any, start: Any, group: Any, output: Any) -> list[list[e.Register]]:
    """The sums of one group: [r][vectors] registers."""
    r, unroll = how.layout.r, how.layout.unroll if how.layout.r * how.vectors < 8 else how.layout.step
    first, last = e.let(e.load(a.pointers, group)), e.let(e.load(a.pointers, group + 1))
    partial = [[[e.Register(LANES, e.broadcast(e.load(a.bias, output + row) if u == 0 else e.zero(), LANES)) for _ in range(how.vectors)]
                for row in range(r)] for u in range(unroll // 2 if how.dot else unroll)]

    def column(u: int, v: int) -> Any:
        """The packed column of this step's place u."""
        at = start + e.cast("int32", e.load(a.columns, first + j * unroll + u)) * how.rows
        return e.let(e.load(packed, at + v * LANES, lanes=LANES))

    with e.loop(e.floordiv(last - first, unroll)) as j:
        for u, sums in enumerate(partial):
            if how.dot:
                inputs = [e.let(e.pair(column(2 * u, v), column(2 * u + 1, v), LANES)) for v in range(how.vectors)]
            else:
                inputs = [column(u, v) for v in range(how.vectors)]
            for row in range(r):
                if how.dot:
                    word = e.let(e.broadcast(e.load(a.values, (e.floordiv(first + j * unroll, 2) + u) * r + row), LANES))
                    for v in range(how.vectors):
                        sums[row][v].set(e.external(sums[row][v].dtype, "dot_bf16", sums[row][v].get(), inputs[v], word))
                else:
                    weight = e.let(e.broadcast(weights_of(a, how.layout, first + j * unroll, u, row), LANES))
                    for v in range(how.vectors):
                        sums[row][v].multiply_add(weight, inputs[v])
    for row in range(r):
        for v in range(how.vectors):
            for others in partial[1:]:
                partial[0][row][v].set(partial[0][row][v].get() + others[row][v].get())
    return partial[0]


def turn(a: Any, row: Any, sums: list[Any], put: Callable[[Any, Any], None]) -> None:
    """put(row + i, vector of sums[j][i] for all j) for the 16 rows of x that y has."""
    columns = e.transpose([e.let(value) for value in sums])
    halves = [e.stack(LANES // 2 * OUTPUTS, "float32") for _ in range(2)]
    for i, column in enumerate(columns):
        e.store(halves[i // (LANES // 2)], column, i % (LANES // 2) * OUTPUTS, lanes=OUTPUTS)
    for first, half in zip((row, row + LANES // 2), halves, strict=True):
        with e.loop(e.maximum(e.minimum(a.M - first, LANES // 2), 0)) as i:
            put(first + i, e.load(half, i * OUTPUTS, lanes=OUTPUTS))
