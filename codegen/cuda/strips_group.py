"""Strips (strips.py) by products of four warps: a block row of 64 or 128 outputs times a tile of many rows of x.

What is computed is y transposed, outputs by rows, so that one product takes up to 256 rows; it is turned in shared memory before it is written.
Where blocks are whole eights of inputs, x is read as it lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c
from sparsify_compiler.codegen.cuda import groups as g
from sparsify_compiler.codegen.cuda import tiles as t
from sparsify_compiler.codegen.cuda.finish import NOTHING, Finish, Result
from sparsify_compiler.codegen.cuda.strips import DEPTH


@dataclass(frozen=True)
class CudaStripsGroup:
    """f(x, values [L, r], inputs [L], pointers [R + 1], bias [N], (other [M, N],) y [M, N]).

    As CudaStrips, with r 64 or 128, and 128 or 256 `rows` of x a block. x is transposed, [K, Mp], or where `straight` as it is, [M, K], and the
    listed inputs come in eights of neighbours.
    """

    dtype: str
    r: int
    rows: int = 256
    straight: bool = False
    finish: Finish = NOTHING

    @property
    def name(self) -> str:
        return "cuda_strips_group"

    @property
    def depth(self) -> int:
        """Listed inputs of a step."""
        return g.COLUMNS if self.straight else DEPTH

    @property
    def stages(self) -> int:
        """Steps under way: as many as leave room for a second block of few outputs, and as the results need."""
        step = self.depth * (self.rows + self.r) * 2
        return max(2, min(6, (80 if self.r == g.HIGH else 160) * 1024 // step))

    def compute(self) -> Any:
        return e.function("main", lambda: _Block(self).run())


class _Block:
    """What a block does."""

    def __init__(self, how: CudaStripsGroup) -> None:
        self.how, self.threads = how, how.r // g.HIGH * g.WARPS * c.WARP

    def run(self) -> None:
        how = self.how
        M, N, K, Mp, L, P = (e.int32() for _ in range(6))
        self.M, self.Mp = M, Mp
        self.x = c.parameter("x", (M, K) if how.straight else (K, Mp), how.dtype)
        self.values = c.parameter("values", (L, how.r), how.dtype)
        self.inputs, pointers = c.parameter("inputs", (L,), "int32"), c.parameter("pointers", (P,), "int32")
        self.result = Result(how.dtype, how.finish, M, N)
        with c.launch((c.ceil(M, how.rows), P - 1), self.threads) as (bx, by, thread):
            self.thread = thread
            self.first_row = e.let(bx * how.rows)
            x_bytes, self.stage = how.depth * how.rows * 2, how.depth * (how.rows + how.r) * 2
            shared = c.Shared(max(how.stages * self.stage, g.result_bytes(how.rows, how.r)), g.ALIGN)
            self.x_tile = g.Parts(shared, 0, *((how.rows, how.depth) if how.straight else (how.depth, how.rows)))
            self.w_tile = g.Parts(shared, x_bytes, how.depth, how.r)
            self.sums = t.zeros(how.rows // 2)
            self.begin, self.end = (e.let(e.load(pointers, by + i) * DEPTH) for i in range(2))
            self._steps()
            g.write_turned(shared, self.sums, self.result, thread, how.rows, how.r, self.first_row, e.let(by * how.r), M, N)

    def _steps(self) -> None:
        count = e.let(c.ceil(self.end - self.begin, self.how.depth))
        self.own = 1 if self.how.straight else self.how.depth * g.CHUNKS // self.threads    # listed inputs of a thread in a step
        self.places = c.registers(self.own, "int32")
        with e.when(count > 0):
            self._look(c.const(0))
        g.ahead(count, self.how.stages, self.stage, self._copy, self._multiply)

    def _look(self, step: Any) -> None:
        """The inputs that this thread copies in that step; -1 behind the list."""
        for i in range(self.own):
            own = self.thread % g.CHUNKS * t.CHUNK if self.how.straight else tirx.truncdiv(self.thread + i * self.threads, g.CHUNKS)
            at = e.let(self.begin + step * self.how.depth + own)
            e.store(self.places, e.either(at < self.end, e.load(self.inputs, e.minimum(at, self.end - 1)), c.const(-1)), i)

    def _copy(self, step: Any, by: Any) -> None:
        (self._copy_straight if self.how.straight else self._copy_turned)(self.x_tile.moved(by))
        first = e.let(self.begin + step * self.how.depth)

        def of(row: Any, chunk: Any) -> tuple[Any, Any]:
            at = e.let(first + row)
            return c.address(self.values, e.minimum(at, self.end - 1), chunk * t.CHUNK), at < self.end

        t.copy_rows(self.w_tile.moved(by), self.thread, self.threads, of)
        self._look(step + 1)

    def _copy_straight(self, tile: g.Parts) -> None:
        place = e.let(e.load(self.places, 0))

        def of(row: Any, chunk: Any) -> tuple[Any, Any]:
            m = e.let(self.first_row + row)
            return c.address(self.x, e.minimum(m, self.M - 1), e.maximum(place, 0)), e.both(place >= 0, m < self.M)

        t.copy_rows(tile, self.thread, self.threads, of)

    def _copy_turned(self, tile: g.Parts) -> None:
        for part in range(self.how.rows // g.COLUMNS):     # one after the other: a thread's inputs are the same in each
            number = iter(range(self.how.depth))

            def of(row: Any, chunk: Any, part: int = part, number: Any = number) -> tuple[Any, Any]:
                place = e.let(e.load(self.places, next(number)))
                column = e.let(self.first_row + part * g.COLUMNS + chunk * t.CHUNK)
                inside = column < self.Mp
                return c.address(self.x, e.maximum(place, 0), e.either(inside, column, 0)), e.both(place >= 0, inside)

            t.copy_rows(tile.part(part), self.thread, self.threads, of)

    def _multiply(self, by: Any) -> None:
        x, w = self.x_tile.moved(by), self.w_tile.moved(by)
        own = e.let(tirx.truncdiv(self.thread, g.WARPS * c.WARP))
        with g.products():
            for k in range(0, self.how.depth, g.DEEP):
                b = g.straight(x, 0, k) if self.how.straight else g.turned(x, 0, k)
                g.product(self.how.dtype, self.how.rows, self.sums, g.turned(w, own, k), b, a_turned=True, b_turned=not self.how.straight)
