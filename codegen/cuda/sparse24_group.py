"""A weight of 2:4 sparsity (sparse24.py) by products of four warps: y transposed, 128 outputs by a tile of rows of x, turned before it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c
from sparsify_compiler.codegen.cuda import groups as g
from sparsify_compiler.codegen.cuda import tiles as t
from sparsify_compiler.codegen.cuda.finish import NOTHING, Finish, Result

OUTPUTS, DEPTH = 128, 128       # of a block: outputs; inputs of a step, half of them kept
THREADS = OUTPUTS // g.HIGH * g.WARPS * c.WARP
WORDS = 16                      # places of 16 outputs and 32 inputs
PLACES = OUTPUTS // 16 * (DEPTH // 32) * WORDS * 4      # bytes of a step
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
        self.how = how

    def run(self) -> None:
        how = self.how
        self.M, self.N, self.Np, self.K = (e.int32() for _ in range(4))
        half, steps, tiles = (e.int32() for _ in range(3))
        self.x = c.parameter("x", (self.M, self.K), how.dtype)
        self.values, self.places = c.parameter("values", (self.Np, half), how.dtype), c.parameter("places", (tiles, steps, WORDS), "int32")
        result = Result(how.dtype, how.finish, self.M, self.N)
        with c.launch((c.ceil(self.Np, OUTPUTS), c.ceil(self.M, how.rows)), THREADS) as (bx, by, thread):
            self.thread = thread
            self.first_row, self.first_output = e.let(by * how.rows), e.let(bx * OUTPUTS)
            x_bytes, w_bytes = how.rows * DEPTH * 2, OUTPUTS * DEPTH
            stage = x_bytes + w_bytes + PLACES
            stages = min(4, ROOM // stage)
            self.shared = c.Shared(max(stages * stage, g.result_bytes(how.rows, OUTPUTS)), g.ALIGN)
            self.x_tile, self.w_tile = g.Parts(self.shared, 0, how.rows, DEPTH), g.Parts(self.shared, x_bytes, OUTPUTS, DEPTH // 2)
            self.places_at = x_bytes + w_bytes
            self.sums = t.zeros(how.rows // 2)
            g.ahead(e.let(tirx.truncdiv(self.K, DEPTH)), stages, stage, self._copy, self._multiply)
            g.write_turned(self.shared, self.sums, result, thread, how.rows, OUTPUTS, self.first_row, self.first_output, self.M, self.N)

    def _copy(self, step: Any, by: Any) -> None:
        def of_x(row: Any, chunk: Any) -> tuple[Any, Any]:
            number = e.let(self.first_row + row)
            return c.address(self.x, e.minimum(number, self.M - 1), step * DEPTH + chunk * t.CHUNK), number < self.M

        def of_w(row: Any, chunk: Any) -> tuple[Any, Any]:
            number = e.let(self.first_output + row)
            return c.address(self.values, e.minimum(number, self.Np - 1), step * (DEPTH // 2) + chunk * t.CHUNK), number < self.Np

        t.copy_rows(self.x_tile.moved(by), self.thread, THREADS, of_x)
        t.copy_rows(self.w_tile.moved(by), self.thread, THREADS, of_w)
        with e.when(self.thread < PLACES // 16):    # of a tile of 16 outputs: four words a thread, sixteen for each 32 inputs
            tile, quarter = e.let(tirx.truncdiv(self.thread, DEPTH // 8)), e.let(self.thread % (DEPTH // 8))
            number = e.let(tirx.truncdiv(self.first_output, 16) + tile)
            there = e.let(number * 16 < self.Np)
            pointer = c.address(self.places, e.either(there, number, 0), step * (DEPTH // 32) + tirx.truncdiv(quarter, 4), quarter % 4 * 4)
            c.do("copy16", self.shared.at(by + self.places_at + self.thread * 16), pointer, there)

    def _multiply(self, by: Any) -> None:
        x, w, words = self.x_tile.moved(by), self.w_tile.moved(by), e.let(tirx.truncdiv(by + self.places_at, 4))
        lane, warp = e.let(self.thread % c.WARP), e.let(tirx.truncdiv(self.thread, c.WARP))
        own = e.let(words + warp * (DEPTH // 32 * WORDS) + tirx.truncdiv(lane, 4) * 2 + lane % 2)
        first = e.let(tirx.truncdiv(warp, g.WARPS) * g.HIGH)
        told = [e.let(e.cast("uint32", e.load(self.shared.words, own + i * WORDS))) for i in range(DEPTH // 32)]
        with g.products():
            for i, places in enumerate(told):
                g.product_sparse(self.how.dtype, self.how.rows, self.sums, g.straight(w, first, 16 * i), g.straight(x, 0, 32 * i), places)
