"""Few rows of x times a block-sparse weight (linear_bsr): the layout of strips.py, a block of threads for each block row.

The r outputs of a listed input lie side by side: some lanes read them, 16 bytes each, and the others of the warp the next inputs. The sums are
added over lanes, then over warps, always in the same order.
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

WARPS, AHEAD = 8, 8     # of a block: warps, and how many inputs each of its lanes reads at once
THREADS = WARPS * c.WARP


@dataclass(frozen=True)
class CudaStripRows:
    """f(x [M, K], values [L, r], inputs [L], pointers [R + 1], bias [N], (other [M, N],) y [M, N]): strips.py's, with x as it lies.

    M is at most `rows`; r 8, 16, 32, 64 or 128.
    """

    dtype: str
    r: int
    rows: int
    finish: Finish = NOTHING

    @property
    def name(self) -> str:
        return "cuda_strip_rows"

    def compute(self) -> Any:
        return e.function("main", self._body)

    def _body(self) -> None:
        M, K, N, L = (e.int32() for _ in range(4))
        x, values = c.parameter("x", (M, K), self.dtype), c.parameter("values", (L, self.r), self.dtype)
        inputs, pointers = c.parameter("inputs", (L,), "int32"), c.parameter("pointers", (e.int32(),), "int32")
        result = Result(self.dtype, self.finish, M, N)
        each16 = 16 // c.SIZE[self.dtype]   # outputs of a lane
        beside = self.r // each16           # lanes of an input
        each = THREADS // beside            # inputs at once
        with c.launch((c.ceil(N, self.r),), THREADS) as (block, thread):
            shared = c.Shared(WARPS * self.rows * self.r * 4)
            lane, warp = e.let(thread % c.WARP), e.let(tirx.truncdiv(thread, c.WARP))
            sums = [t.zeros(each16) for _ in range(self.rows)]
            begin = e.let(e.load(pointers, block) * DEPTH)
            count = e.let(e.load(pointers, block + 1) * DEPTH - begin)
            mine, part = e.let(tirx.truncdiv(thread, beside)), e.let(thread % beside * each16)
            with e.loop(c.ceil(e.maximum(count - mine, 0), each * AHEAD)) as i:
                numbers = [e.let(mine + (i * AHEAD + j) * each) for j in range(AHEAD)]
                words = [c.registers(4, "uint32") for _ in range(AHEAD)]
                places = []
                for number, own in zip(numbers, words, strict=True):
                    at = e.let(begin + e.minimum(number, count - 1))
                    c.do("load16_if", own.data, c.address(values, at, part), number < count)
                    places.append(e.let(e.either(number < count, e.load(inputs, at), c.const(-1))))
                for place, own in zip(places, words, strict=True):
                    with e.when(place >= 0):
                        for m in range(self.rows):
                            c.do(f"add_{c.SHORT[self.dtype]}", sums[m].data, own.data, c.read(x, e.minimum(M - 1, m), place))
            self._add(shared, sums, lane, warp, beside, each16)
            with e.loop(c.const(-(-self.r * self.rows // THREADS))) as i:
                number = e.let(thread + i * THREADS)
                m, output = e.let(tirx.truncdiv(number, self.r)), e.let(number % self.r)
                n = e.let(block * self.r + output)
                with e.when(e.both(e.both(m < self.rows, m < M), n < N)):
                    total = t.zeros(1)
                    for w in range(WARPS):
                        e.store(total, e.load(total, 0) + e.load(shared.floats, (w * self.rows + m) * self.r + output), 0)
                    result.write(e.load(total, 0), m, n)

    def _add(self, shared: c.Shared, sums: list[Any], lane: Any, warp: Any, beside: int, each16: int) -> None:
        """Over the lanes that hold the same outputs, to shared memory."""
        for m, own in enumerate(sums):
            for i in range(each16):
                bit = beside
                while bit < c.WARP:
                    e.store(own, e.load(own, i) + c.of("float32", "shuffle_xor", e.load(own, i), c.const(bit)), i)
                    bit *= 2
                with e.when(lane < beside):
                    e.store(shared.floats, e.load(own, i), (warp * self.rows + m) * self.r + lane * each16 + i)
        c.barrier()
