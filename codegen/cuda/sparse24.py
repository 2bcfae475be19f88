"""A weight of 2:4 sparsity times many rows of x (linear_nm, n = 2, m = 4), on sparse tensor cores: mma.sp m16n8k32.

The sparse operand is the first one of the instruction, so what is computed is y transposed: outputs × rows, turned in shared memory before it is
written. Places of the kept values come two bits each, in the order in which lanes need them (layout.places_of).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c
from sparsify_compiler.codegen.cuda import tiles as t
from sparsify_compiler.codegen.cuda.finish import NOTHING, Finish, Result

OUTPUTS, DEPTH, STAGES = 128, 64, 3     # of a block: outputs; inputs of a step, half of them kept; steps under way
LINE = OUTPUTS + 4                      # floats from one row of the turned result to the next
WORDS = 16                              # places of 16 outputs and 32 inputs


@dataclass(frozen=True)
class CudaSparse24:
    """f(x [M, K], values [Np, K / 2], places [Np / 16, K / 32, 16], bias [N], (other [M, N],) y [M, N]).

    x, values, other and y of `dtype` (16 bits), bias float32; Np is N rounded up to a multiple of 16; K a multiple of 64, N of 8. `rows` of x a
    block: 32, 64 or 128.
    """

    dtype: str
    rows: int = 128
    finish: Finish = NOTHING

    @property
    def name(self) -> str:
        return "cuda_sparse24"

    def compute(self) -> Any:
        return e.function("main", lambda: _Block(self).run())


class Halves:
    """The arguments, and what a block of 128 outputs copies in a step of `depth` inputs."""

    def __init__(self, dtype: str, finish: Finish, rows: int, depth: int, tile: type[t.Tile]) -> None:
        self.dtype, self.finish, self.rows, self.depth, self._tile = dtype, finish, rows, depth, tile
        self.places_at = rows * depth * 2 + OUTPUTS * depth
        self.stage = self.places_at + depth // 32 * OUTPUTS // 16 * WORDS * 4   # bytes of a step

    def arguments(self) -> None:
        """All parameters."""
        self.M, self.N, self.Np, self.K = (e.int32() for _ in range(4))
        half, steps, tiles = (e.int32() for _ in range(3))
        self.x = c.parameter("x", (self.M, self.K), self.dtype)
        self.values, self.places = c.parameter("values", (self.Np, half), self.dtype), c.parameter("places", (tiles, steps, WORDS), "int32")
        self.result = Result(self.dtype, self.finish, self.M, self.N)

    def take(self, shared: c.Shared, thread: Any, threads: int, first_row: Any, first_output: Any) -> None:
        """The block's place, and its shared memory."""
        self.shared, self.thread, self.threads, self.first_row, self.first_output = shared, thread, threads, first_row, first_output
        self.x_tile = self._tile(shared, 0, self.rows, self.depth)
        self.w_tile = self._tile(shared, self.rows * self.depth * 2, OUTPUTS, self.depth // 2)

    def copy(self, step: Any, by: Any) -> None:
        """Begin to."""
        def of_x(row: Any, chunk: Any) -> tuple[Any, Any]:
            number = e.let(self.first_row + row)
            return c.address(self.x, e.minimum(number, self.M - 1), step * self.depth + chunk * t.CHUNK), number < self.M

        def of_w(row: Any, chunk: Any) -> tuple[Any, Any]:
            number = e.let(self.first_output + row)
            return c.address(self.values, e.minimum(number, self.Np - 1), step * (self.depth // 2) + chunk * t.CHUNK), number < self.Np

        t.copy_rows(self.x_tile.moved(by), self.thread, self.threads, of_x)
        t.copy_rows(self.w_tile.moved(by), self.thread, self.threads, of_w)
        with e.when(self.thread < (self.stage - self.places_at) // 16):     # of 16 outputs four words a thread, all inputs after each other
            tile, quarter = e.let(tirx.truncdiv(self.thread, self.depth // 8)), e.let(self.thread % (self.depth // 8))
            number = e.let(tirx.truncdiv(self.first_output, 16) + tile)
            there = e.let(number * 16 < self.Np)
            at = step * (self.depth // 32) + tirx.truncdiv(quarter, 4)
            pointer = c.address(self.places, e.either(there, number, 0), at, quarter % 4 * 4)
            c.do("copy16", self.shared.at(by + self.places_at + self.thread * 16), pointer, there)


class _Block:
    """What a block does: 8 warps, each 32 or 64 outputs × 32 rows."""

    def __init__(self, how: CudaSparse24) -> None:
        self.how, self.halves = how, Halves(how.dtype, how.finish, how.rows, DEPTH, t.Tile)
        self.row_warps = how.rows // 32
        self.output_warps = 4 if how.rows <= 64 else 2
        self.threads = self.row_warps * self.output_warps * c.WARP
        self.own = OUTPUTS // self.output_warps

    def run(self) -> None:
        how, halves = self.how, self.halves
        halves.arguments()
        with c.launch((c.ceil(halves.Np, OUTPUTS), c.ceil(halves.M, how.rows)), self.threads) as (bx, by, thread):
            self.thread, self.lane, warp = thread, e.let(thread % c.WARP), e.let(tirx.truncdiv(thread, c.WARP))
            self.row, self.output = e.let(warp % self.row_warps * 32), e.let(tirx.truncdiv(warp, self.row_warps) * self.own)
            self.shared = c.Shared(max(STAGES * halves.stage, how.rows * LINE * 4))
            halves.take(self.shared, thread, self.threads, e.let(by * how.rows), e.let(bx * OUTPUTS))
            self.sums = t.zeros(self.own // 16 * 4 * 4)
            t.ahead(e.let(tirx.truncdiv(halves.K, DEPTH)), STAGES, halves.stage, halves.copy, self._multiply)
            c.do("copies_wait", c.const(0))
            c.barrier()
            self._turn()
            self._write()

    def _multiply(self, by: Any) -> None:
        halves = self.halves
        x, w, words = halves.x_tile.moved(by), halves.w_tile.moved(by), e.let(tirx.truncdiv(by + halves.places_at, 4))
        own = e.let(tirx.truncdiv(self.lane, 4) * 2 + self.lane % 2)
        for half in range(DEPTH // 32):
            rows = [c.registers(4, "uint32") for _ in range(4)]
            for j, fragment in enumerate(rows):     # 32 inputs of 8 rows: four matrices side by side
                row = e.let(self.row + 8 * j + self.lane % 8)
                c.do("matrices", fragment.data, x.at(row, 4 * half + tirx.truncdiv(self.lane, 8)))
            for i in range(self.own // 16):
                kept = c.registers(4, "uint32")
                w.matrices(kept.data, self.output + 16 * i, 2 * half, self.lane, down=True, turned=False)
                tile = e.let(tirx.truncdiv(self.output, 16) + i)
                told = e.let(e.load(self.shared.words, words + tile * 32 + half * 16 + own))
                for j, fragment in enumerate(rows):
                    c.do(f"multiply_sparse_{c.SHORT[self.how.dtype]}", t.part(self.sums, (i * 4 + j) * 4), kept.data, fragment.data,
                         e.cast("uint32", told))

    def _turn(self) -> None:
        """The sums, [row][output] in shared memory."""
        for i in range(self.own // 16):
            for j in range(4):
                for number in range(4):
                    output = self.output + 16 * i + number // 2 * 8 + tirx.truncdiv(self.lane, 4)
                    row = self.row + 8 * j + self.lane % 4 * 2 + number % 2
                    e.store(self.shared.floats, e.load(self.sums, (i * 4 + j) * 4 + number), row * LINE + output)
        c.barrier()

    def _write(self) -> None:
        """Eight outputs of a row a thread."""
        with e.loop(c.const(self.how.rows * OUTPUTS // 8 // self.threads)) as i:
            number = e.let(self.thread + i * self.threads)
            row, column = e.let(tirx.truncdiv(number, OUTPUTS // 8)), e.let(number % (OUTPUTS // 8) * 8)
            m, n = e.let(self.halves.first_row + row), e.let(self.halves.first_output + column)
            with e.when(e.both(m < self.halves.M, n < self.halves.N)):
                for j in range(0, 8, 2):
                    totals = [e.load(self.shared.floats, row * LINE + column + k) + self.halves.result.bias(n + k) for k in range(j, j + 2)]
                    self.halves.result.write_pair(totals, m, n + j)
