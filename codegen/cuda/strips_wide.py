"""A block-sparse weight times many rows of x in float32: strips.py's scheme by plain multiplications, which round as float32 does.

A thread sums 4 rows × 4 outputs; the next step's inputs are copied to shared memory meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c
from sparsify_compiler.codegen.cuda import tiles as t
from sparsify_compiler.codegen.cuda.finish import NOTHING, Finish, Result
from sparsify_compiler.codegen.cuda.strips import DEPTH

ROWS, OWN = 64, 4       # rows of x of a block; rows, and outputs, of a thread


@dataclass(frozen=True)
class CudaStripsWide:
    """f(xt [K, Mp], values [L, r], inputs [L], pointers [R + 1], bias [N], (other [M, N],) y [M, N]): strips.py's, all of float32.

    Mp is a multiple of 4.
    """

    r: int
    finish: Finish = NOTHING

    @property
    def name(self) -> str:
        return "cuda_strips_wide"

    def compute(self) -> Any:
        return e.function("main", lambda: _Block(self).run())


class _Block:
    """What a block does."""

    def __init__(self, how: CudaStripsWide) -> None:
        self.how, self.r, self.across = how, how.r, ROWS // OWN
        self.threads = self.across * (how.r // OWN)

    def run(self) -> None:
        M, N, K, Mp, L, P = (e.int32() for _ in range(6))
        self.xt, self.values = c.parameter("xt", (K, Mp), "float32"), c.parameter("values", (L, self.r), "float32")
        self.inputs, pointers = c.parameter("inputs", (L,), "int32"), c.parameter("pointers", (P,), "int32")
        result = Result("float32", self.how.finish, M, N)
        with c.launch((c.ceil(M, ROWS), P - 1), self.threads) as (bx, by, thread):
            self.thread, self.first_row, self.Mp = thread, e.let(bx * ROWS), Mp
            self.row, self.output = e.let(thread % self.across * OWN), e.let(tirx.truncdiv(thread, self.across) * OWN)
            self.stage = DEPTH * (ROWS + self.r) * 4
            self.shared, self.sums = c.Shared(2 * self.stage), t.zeros(OWN * OWN)
            begin, end = (e.let(e.load(pointers, by + i)) for i in range(2))
            self._copy(begin, end, c.const(0))
            with e.loop(e.let(end - begin)) as step:
                self._copy(e.let(begin + step + 1), end, e.let((step + 1) % 2 * self.stage))
                c.do("copies_wait", c.const(1))
                c.barrier()
                at = e.let(step % 2 * self.stage)
                with e.loop(c.const(DEPTH)) as k:
                    c.do("add_outer", self.sums.data, self.shared.at(at + (k * ROWS + self.row) * 4),
                         self.shared.at(at + (DEPTH * ROWS + k * self.r + self.output) * 4))
                c.barrier()
            for j in range(OWN):
                n = e.let(by * self.r + self.output + j)
                with e.when(n < N):
                    for i in range(OWN):
                        m = e.let(self.first_row + self.row + i)
                        with e.when(m < M):
                            result.write(e.load(self.sums, OWN * i + j), m, n)

    def _copy(self, step: Any, end: Any, by: Any) -> None:
        """Begin to copy a step, if there is one: DEPTH lines of x, and of the weight."""
        with e.when(step < end):
            for first in range(0, DEPTH * ROWS // 4, self.threads):
                number = e.let(self.thread + first)
                k, column = e.let(tirx.truncdiv(number, ROWS // 4)), e.let(self.first_row + number % (ROWS // 4) * 4)
                place = e.let(e.load(self.inputs, step * DEPTH + k))
                pointer = c.address(self.xt, e.maximum(place, 0), e.either(column < self.Mp, column, 0))
                c.do("copy16", self.shared.at(by + number * 16), pointer, e.both(place >= 0, column < self.Mp))
            for first in range(0, DEPTH * self.r // 4, self.threads):
                number = e.let(self.thread + first)
                pointer = c.address(self.values, step * DEPTH + tirx.truncdiv(number, self.r // 4), number % (self.r // 4) * 4)
                c.do("copy16", self.shared.at(by + DEPTH * ROWS * 4 + number * 16), pointer, t.true())
        c.do("copies_end_group")
