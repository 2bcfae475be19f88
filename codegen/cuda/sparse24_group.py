"""A weight of 2:4 sparsity (sparse24.py) by products of four warps: y transposed, 128 outputs by a tile of rows of x, turned before it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c
from sparsify_compiler.codegen.cuda import groups as g
from sparsify_compiler.codegen.cuda import tiles as t
from sparsify_compiler.codegen.cuda.finish import NOTHING, Finish
from sparsify_compiler.codegen.cuda.sparse24 import OUTPUTS, WORDS, Halves

DEPTH = 128                     # inputs of a step, half of them kept
THREADS = OUTPUTS // g.HIGH * g.WARPS * c.WARP
ROOM = 200 * 1024               # bytes of steps under way


@dataclass(frozen=True)
class CudaSparse24Group:
    """f(x [M, K], values [Np, K / 2], places [Np / 16, K / 32, 16], bias [N], (other [M, N],) y [M, N]).

    As CudaSparse24; K a multiple of 128. `rows` of x a block: 128 or 256.
    """

    dtype: str
    rows: int = 256
    finish: Finish = NOTHING

    @property
    def name(self) -> str:
        return "cuda_sparse24_group"

    def compute(self) -> Any:
        return e.function("main", lambda: _Block(self).run())


class _Block:
    """What a block does."""

    def __init__(self, how: CudaSparse24Group) -> None:
        self.how, self.halves = how, Halves(how.dtype, how.finish, how.rows, DEPTH, g.Parts)

    def run(self) -> None:
        rows, halves = self.how.rows, self.halves
        halves.arguments()
        with c.launch((c.ceil(halves.Np, OUTPUTS), c.ceil(halves.M, rows)), THREADS) as (bx, by, thread):
            self.thread, stages = thread, min(4, ROOM // halves.stage)
            self.shared = c.Shared(max(stages * halves.stage, g.result_bytes(rows, OUTPUTS)), g.ALIGN)
            halves.take(self.shared, thread, THREADS, e.let(by * rows), e.let(bx * OUTPUTS))
            self.sums = t.zeros(rows // 2)
            g.ahead(e.let(tirx.truncdiv(halves.K, DEPTH)), stages, halves.stage, halves.copy, self._multiply)
            g.write_turned(self.shared, self.sums, halves.result, thread, rows, OUTPUTS, halves.first_row, halves.first_output, halves.M, halves.N)

    def _multiply(self, by: Any) -> None:
        halves = self.halves
        x, w, words = halves.x_tile.moved(by), halves.w_tile.moved(by), e.let(tirx.truncdiv(by + halves.places_at, 4))
        lane, warp = e.let(self.thread % c.WARP), e.let(tirx.truncdiv(self.thread, c.WARP))
        own = e.let(words + warp * (DEPTH // 32 * WORDS) + tirx.truncdiv(lane, 4) * 2 + lane % 2)
        first = e.let(tirx.truncdiv(warp, g.WARPS) * g.HIGH)
        told = [e.let(e.cast("uint32", e.load(self.shared.words, own + i * WORDS))) for i in range(DEPTH // 32)]
        with g.products():
            for i, places in enumerate(told):
                g.product_sparse(self.how.dtype, self.how.rows, self.sums, g.straight(w, first, 16 * i), g.straight(x, 0, 32 * i), places)
