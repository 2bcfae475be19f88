"""Few rows of x times a sparse weight of any structure: a warp for each output, its kept values 16 bytes a lane.

What takes time is reading the weight: values, and columns of 16 bits. x lies in shared memory, where gathering is cheap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c
from sparsify_compiler.codegen.cuda import tiles as t
from sparsify_compiler.codegen.cuda.finish import NOTHING, Finish, Result

WARPS, EIGHT = 16, 8
THREADS = WARPS * c.WARP
INDEX = {"int16": "short", "int32": "int"}


@dataclass(frozen=True)
class CudaSparseRows:
    """f(x [M, K], values [L], columns [L], pointers [N + 1], counts [N], bias [N], (other [M, N],) y [M, N], blocks).

    x, values, other, y of `dtype`; columns of `index`; pointers, in eights, and counts int32; bias float32. Each output's list is padded to a
    multiple of eight. M is at most `rows`; K a multiple of 16 bytes, at most `capacity`, a multiple of 8. `blocks` share the outputs.
    """

    dtype: str
    index: str
    rows: int
    capacity: int
    finish: Finish = NOTHING

    @property
    def name(self) -> str:
        return "cuda_sparse_rows"

    def compute(self) -> Any:
        return e.function("main", lambda: _Block(self).run())


class _Block:
    """What a block does."""

    def __init__(self, how: CudaSparseRows) -> None:
        self.how = how
        self.type = c.SHORT[how.dtype].capitalize()

    def run(self) -> None:
        how = self.how
        self.M, self.K, self.N = (e.int32() for _ in range(3))
        self.x = c.parameter("x", (self.M, self.K), how.dtype)
        L = e.int32()
        self.values, self.columns = c.parameter("values", (L,), how.dtype), c.parameter("columns", (L,), how.index)
        self.pointers, self.counts = c.parameter("pointers", (e.int32(),), "int32"), c.parameter("counts", (e.int32(),), "int32")
        self.result, blocks = Result(how.dtype, how.finish, self.M, self.N), c.number("blocks")
        with c.launch((blocks,), THREADS) as (block, thread):
            self.lane = e.let(thread % c.WARP)
            size = c.SIZE[how.dtype]
            self.shared = c.Shared(how.rows * how.capacity * size)
            self._stage(thread, 16 // size, size)
            first = e.let(block * WARPS + tirx.truncdiv(thread, c.WARP))
            with e.loop(c.ceil(e.maximum(self.N - first, 0), blocks * WARPS)) as i:
                self._output(e.let(first + i * (blocks * WARPS)))

    def _stage(self, thread: Any, lanes: int, size: int) -> None:
        """x to shared memory; rows that there are not repeat the last one."""
        for m in range(self.how.rows):
            with e.loop(c.ceil(e.maximum(tirx.truncdiv(self.K, lanes) - thread, 0), THREADS)) as i:
                column = e.let((thread + i * THREADS) * lanes)
                c.do("stage16", self.shared.at((m * self.how.capacity + column) * size), c.address(self.x, e.minimum(self.M - 1, m), column))
        c.barrier()

    def _output(self, n: Any) -> None:
        how = self.how
        sums = t.zeros(how.rows)
        start, kept = e.let(e.load(self.pointers, n)), e.let(e.load(self.counts, n))
        with e.loop(c.ceil(e.maximum(c.ceil(kept, EIGHT) - self.lane, 0), c.WARP)) as i:
            eight = e.let(self.lane + i * c.WARP)
            at = e.let((start + eight) * EIGHT)
            c.do(f"add_listed<{self.type}, {INDEX[how.index]}, {how.rows}>", sums.data, c.address(self.values, at), c.address(self.columns, at),
                 self.shared.at(c.const(0)), c.const(how.capacity), kept - eight * EIGHT)
        self._write(n, sums)

    def _write(self, n: Any, sums: Any) -> None:
        for m in range(self.how.rows):
            total = c.of("float32", "warp_sum", e.load(sums, m))
            with e.when(e.both(tirx.EQ(self.lane, 0), m < self.M)):
                self.result.write(total, m, n)
