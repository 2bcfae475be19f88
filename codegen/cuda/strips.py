"""A block-sparse weight times many rows of x (linear_bsr, blocks r x c with r a multiple of 16), on tensor cores.

A block row is a list of inputs, whatever c is: the weight of its r outputs is a dense [inputs, r] matrix. x lies input by input, [K, M], so that the
listed inputs are whole lines of memory. A block takes a tile of rows of x and one block row, gathers DEPTH listed inputs a step into shared memory,
several steps ahead of the products, and never meets a zero. The same scheme as column-vector encodings have (Chen et al., SC'21, section 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c
from sparsify_compiler.codegen.cuda import tiles as t
from sparsify_compiler.codegen.cuda.finish import NOTHING, Finish, Result

DEPTH, STAGES = 32, 4       # listed inputs of a step, steps under way
OWN_ROWS, OWN_OUTPUTS = 32, 64      # of a warp, at the most


@dataclass(frozen=True)
class CudaStrips:
    """f(xt [K, Mp], values [L, r], inputs [L], pointers [R + 1], bias [N], (other [M, N],) y [M, N]).

    xt, values, other and y of `dtype` (16 bits), bias float32. The lists are padded to multiples of DEPTH with input -1; pointers counts DEPTHs.
    Mp is M rounded up to a multiple of 8, and N is a multiple of 8. `rows` of x a block: 32 or 128.
    """

    dtype: str
    r: int
    rows: int = 128
    finish: Finish = NOTHING

    @property
    def name(self) -> str:
        return "cuda_strips"

    @property
    def warps(self) -> tuple[int, int]:
        """Along rows and outputs."""
        along = max(1, self.r // OWN_OUTPUTS) if self.rows > OWN_ROWS else self.r // 16 if self.r <= 64 else 4
        return self.rows // OWN_ROWS, along

    def compute(self) -> Any:
        return e.function("main", lambda: _Block(self).run())


class _Block:
    """What a block does."""

    def __init__(self, how: CudaStrips) -> None:
        self.how, self.r = how, how.r
        self.row_warps, self.output_warps = how.warps
        self.threads = self.row_warps * self.output_warps * c.WARP
        self.own = self.r // self.output_warps      # outputs of a warp

    def run(self) -> None:
        how = self.how
        M, N, K, Mp, L, P = (e.int32() for _ in range(6))
        self.M, self.N, self.Mp = M, N, Mp
        self.xt, self.values = c.parameter("xt", (K, Mp), how.dtype), c.parameter("values", (L, self.r), how.dtype)
        self.inputs, pointers = c.parameter("inputs", (L,), "int32"), c.parameter("pointers", (P,), "int32")
        self.result = Result(how.dtype, how.finish, M, N)
        with c.launch((c.ceil(M, how.rows), P - 1), self.threads) as (bx, by, thread):
            self.thread, self.lane, warp = thread, e.let(thread % c.WARP), e.let(tirx.truncdiv(thread, c.WARP))
            self.row = e.let(tirx.truncdiv(warp, self.output_warps) * OWN_ROWS)
            self.output = e.let(warp % self.output_warps * self.own)
            self.first_row = e.let(bx * how.rows)
            x_bytes, step_bytes = DEPTH * how.rows * 2, DEPTH * (how.rows + self.r) * 2
            shared = c.Shared(STAGES * step_bytes)
            self.x, self.w = t.Tile(shared, 0, DEPTH, how.rows), t.Tile(shared, x_bytes, DEPTH, self.r)
            self.step_bytes = step_bytes
            self.sums = t.zeros(OWN_ROWS // 16 * self.own // 8 * 4)
            begin, end = (e.let(e.load(pointers, by + i)) for i in range(2))
            self._steps(begin, e.let(end - begin))
            self._write(by)

    def _steps(self, begin: Any, count: Any) -> None:
        chunks = self.how.rows // t.CHUNK
        self.places = c.registers(-(-DEPTH * chunks // self.threads), "int32")
        for stage in range(STAGES - 1):
            with e.when(count > stage):
                self._look(e.let(begin + stage))
                self._copy(e.let(begin + stage), stage)
            c.do("copies_end_group")
        with e.when(count > STAGES - 1):
            self._look(e.let(begin + STAGES - 1))
        with e.loop(count) as step:
            c.do("copies_wait", c.const(STAGES - 2))
            c.barrier()
            ahead = e.let(step + STAGES - 1)
            with e.when(ahead < count):
                self._copy(e.let(begin + ahead), e.let(ahead % STAGES))
            c.do("copies_end_group")
            with e.when(ahead + 1 < count):
                self._look(e.let(begin + ahead + 1))
            self._multiply(e.let(step % STAGES * self.step_bytes))

    def _look(self, step: Any) -> None:
        """The inputs whose lines this thread copies next."""
        chunks = self.how.rows // t.CHUNK
        for i, first in enumerate(range(0, DEPTH * chunks, self.threads)):
            row = e.minimum(tirx.truncdiv(self.thread + first, chunks), DEPTH - 1)
            e.store(self.places, e.load(self.inputs, step * DEPTH + row), i)

    def _copy(self, step: Any, stage: Any) -> None:
        by, number = stage * self.step_bytes, iter(range(DEPTH))

        def of_x(row: Any, chunk: Any) -> tuple[Any, Any]:
            place = e.let(e.load(self.places, next(number)))
            column = e.let(self.first_row + chunk * t.CHUNK)
            there = e.both(place >= 0, column < self.Mp)
            return c.address(self.xt, e.maximum(place, 0), e.either(column < self.Mp, column, 0)), there

        t.copy_rows(self.x.moved(by), self.thread, self.threads, of_x)
        t.copy_rows(self.w.moved(by), self.thread, self.threads,
                    lambda row, chunk: (c.address(self.values, step * DEPTH + row, chunk * t.CHUNK), t.true()))

    def _multiply(self, by: Any) -> None:
        x, w = self.x.moved(by), self.w.moved(by)
        for k in range(0, DEPTH, 16):
            a = [c.registers(4, "uint32") for _ in range(OWN_ROWS // 16)]
            for i, fragment in enumerate(a):    # [k][m] in memory: turned, and the second matrix lies beside the first
                x.matrices(fragment.data, k, tirx.truncdiv(self.row, t.CHUNK) + 2 * i, self.lane, down=False, turned=True)
            for j in range(self.own // 16):
                b = c.registers(4, "uint32")
                w.matrices(b.data, k, tirx.truncdiv(self.output, t.CHUNK) + 2 * j, self.lane, down=True, turned=True)
                for i, fragment in enumerate(a):
                    for n in range(2):
                        t.product(self.how.dtype, t.part(self.sums, self._at(i, 2 * j + n)), fragment.data, t.part(b, 2 * n))

    def _at(self, i: int, n: int) -> int:
        return (i * (self.own // 8) + n) * 4

    def _write(self, block_row: Any) -> None:
        for n in range(self.own // 8):
            output = e.let(block_row * self.r + self.output + 8 * n + self.lane % 4 * 2)
            with e.when(output < self.N):
                bias = [e.let(self.result.bias(output + j)) for j in range(2)]
                for i in range(OWN_ROWS // 16):
                    for half in range(2):
                        row = e.let(self.first_row + self.row + 16 * i + 8 * half + tirx.truncdiv(self.lane, 4))
                        with e.when(row < self.M):
                            totals = [e.load(self.sums, self._at(i, n) + 2 * half + j) + bias[j] for j in range(2)]
                            self.result.write_pair(totals, row, output)
