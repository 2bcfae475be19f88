"""Few rows of x times a weight of 2:4 sparsity (linear_nm, n = 2, m = 4): the layout of sparse24.py, a block of threads for 16 outputs.

A lane takes two outputs, the halves of a word of places, and the sixteen inputs that the word tells of: x comes by words, and two kept inputs of
each four are picked out of two words at once, by bytes. What takes time is reading the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c
from sparsify_compiler.codegen.cuda import tiles as t
from sparsify_compiler.codegen.cuda.finish import NOTHING, Finish, Result
from sparsify_compiler.codegen.cuda.sparse24 import WORDS

TILE, HALF = 16, 8      # outputs: of a block, and from one of a lane to its other
STEP, STEPS = 32, 4     # inputs that the words of a tile tell of; how many of these a warp looks at at once
OWN = 4                 # words of places of a step that a warp reads from, of each pair


@dataclass(frozen=True)
class CudaSparse24Rows:
    """f(x [M, K], values [Np, K / 2], places [Np / 16, K / 32, 16], bias [N], (other [M, N],) y [M, N]).

    As CudaSparse24, M at most `rows`. 2 * `parts` warps share a tile, each a part of the inputs and half of the outputs; a lane reads `ahead` times
    32 bytes of values at once.
    """

    dtype: str
    rows: int
    parts: int = 4
    ahead: int = 8
    finish: Finish = NOTHING

    @property
    def name(self) -> str:
        return "cuda_sparse24_rows"

    def compute(self) -> Any:
        return e.function("main", lambda: _Block(self).run())


class _Block:
    """What a block does."""

    def __init__(self, how: CudaSparse24Rows) -> None:
        self.how, self.warps = how, 2 * how.parts

    def run(self) -> None:
        how = self.how
        self.M, self.K, self.N = (e.int32() for _ in range(3))
        Np, half, steps, tiles = (e.int32() for _ in range(4))
        self.x = c.parameter("x", (self.M, self.K), how.dtype)
        self.values, self.places = c.parameter("values", (Np, half), how.dtype), c.parameter("places", (tiles, steps, WORDS), "int32")
        self.result = Result(how.dtype, how.finish, self.M, self.N)
        with c.launch((tiles,), self.warps * c.WARP) as (self.tile, self.thread):
            self.shared = c.Shared(how.parts * how.rows * TILE * 4)
            self.steps = e.let(tirx.truncdiv(self.K, STEP))
            lane, warp = e.let(self.thread % c.WARP), e.let(tirx.truncdiv(self.thread, c.WARP))
            self.pair = e.let(warp % 2 * OWN + tirx.truncdiv(lane, 2 * STEPS))
            self.step, self.place, self.part = e.let(tirx.truncdiv(lane, 2) % STEPS), e.let(lane % 2), e.let(tirx.truncdiv(warp, 2))
            self.sums = t.zeros(2 * how.rows)
            output = e.let(self.thread % TILE)
            bias = self.result.bias(e.minimum(self.tile * TILE + output, self.N - 1))
            each = how.parts * STEPS    # steps of all warps at once
            with e.loop(c.ceil(self.steps, each * how.ahead)) as i:
                self._steps([e.let(((i * how.ahead + j) * how.parts + self.part) * STEPS + self.step) for j in range(how.ahead)])
            self._add(lane)
            self._write(output, e.let(bias))

    def _steps(self, steps: list[Any]) -> None:
        """Read several, then add them."""
        words = [[c.registers(4, "uint32") for _ in range(2)] for _ in steps]
        told = []
        for step, pair in zip(steps, words, strict=True):
            inside, at = e.let(step < self.steps), e.let(e.minimum(step, self.steps - 1))
            for i, own in enumerate(pair):
                output = self.tile * TILE + i * HALF + self.pair
                c.do("load16_if", own.data, c.address(self.values, output, at * (STEP // 2) + self.place * 8), inside)
            told.append(e.let(e.cast("uint32", e.load(self.places, self.tile, at, 2 * self.pair + self.place))))
        for step, pair, places in zip(steps, words, told, strict=True):
            at = e.let(e.minimum(step, self.steps - 1) * STEP + self.place * 16)
            for m in range(self.how.rows):
                numbers = c.registers(8, "uint32")
                for i in range(2):
                    c.do("load16_shared_by_many", c.address(numbers, 4 * i), c.address(self.x, e.minimum(self.M - 1, m), at + 8 * i))
                for i, own in enumerate(pair):
                    kind = c.SHORT[self.how.dtype].capitalize()
                    c.do(f"add_kept<{kind}>", c.address(self.sums, 2 * m + i), own.data, places >> e.cast("uint32", 16 * i), numbers.data)

    def _add(self, lane: Any) -> None:
        """Over the lanes and warps that have the same outputs."""
        for m in range(self.how.rows):
            for i in range(2):
                total = t.zeros(1)
                e.store(total, e.load(self.sums, 2 * m + i), 0)
                for bit in (1, 2, 4):
                    e.store(total, e.load(total, 0) + c.of("float32", "shuffle_xor", e.load(total, 0), c.const(bit)), 0)
                with e.when(tirx.EQ(lane % (2 * STEPS), 0)):
                    e.store(self.shared.floats, e.load(total, 0), (self.part * self.how.rows + m) * TILE + i * HALF + self.pair)
        c.barrier()

    def _write(self, output: Any, bias: Any) -> None:
        m, n = e.let(tirx.truncdiv(self.thread, TILE)), e.let(self.tile * TILE + output)
        with e.when(e.both(e.both(m < self.how.rows, m < self.M), n < self.N)):
            total = t.zeros(1)
            for part in range(self.how.parts):
                e.store(total, e.load(total, 0) + e.load(self.shared.floats, (part * self.how.rows + m) * TILE + output), 0)
            self.result.write_biased(e.load(total, 0) + bias, m, n)
