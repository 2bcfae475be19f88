"""Few rows of x times the weights of the inputs that they select (select_linear), W input by input: what a language model does for each token.

A block takes some columns of W and a part of the inputs. Its threads select the inputs first, into a list in shared memory, in order; then each
warp reads some rows of the list, 16 bytes a lane, several rows at once. The sums of the warps are added in order, and those of the parts by the
block that comes last, in order too: results do not depend on which one that is. TEAL (arXiv:2408.14690), section 4.3, fuses the selection likewise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c

OWN = 2                         # inputs that a thread looks at in a step
TOGETHER = 8                    # parts of a result that are read at once


@dataclass(frozen=True)
class CudaGatherRows:
    """f(x [M, K], limit [L], scale [K], center [K], weight [K, N], sums [N], partial [parts, M, N], counters [tiles], y [M, N], parts).

    x of `source`, W and y of `dtype`, the rest float32; L is 1 or M; M is at most `rows`; N is a multiple of the elements in 16 bytes.
    sums is what y begins from: bias, and what the centres give. counters are 0, and are so again afterwards. A block has so many warps, each of
    which reads `ahead` rows of W at once.
    """

    dtype: str
    rows: int
    scaled: bool = False
    centered: bool = False
    source: str = ""
    warps: int = 8
    ahead: int = 8

    @property
    def name(self) -> str:
        return "cuda_gather_rows"

    @property
    def lanes(self) -> int:
        """Elements in 16 bytes."""
        return 16 // c.SIZE[self.dtype]

    def compute(self) -> Any:
        return e.function("main", lambda: _Block(self).run())


class _Block:
    """What a block does."""

    def __init__(self, how: CudaGatherRows) -> None:
        self.how, self.rows, self.lanes, self.dtype = how, how.rows, how.lanes, how.dtype
        self.warps, self.ahead, self.threads = how.warps, how.ahead, how.warps * c.WARP
        self.step = self.threads * OWN      # inputs

    def run(self) -> None:
        M, K, N, L, S, P, T = (e.int32() for _ in range(7))
        x, limit = c.parameter("x", (M, K), self.how.source or self.dtype), c.parameter("limit", (L,), "float32")
        scale, center = (c.parameter(name, (S,) if name == "scale" else (e.int32(),), "float32") for name in ("scale", "center"))
        weight, sums = c.parameter("weight", (K, N), self.dtype), c.parameter("sums", (N,), "float32")
        partial, counters = c.parameter("partial", (P, M, N), "float32"), c.parameter("counters", (T,), "int32")
        y, parts = c.parameter("y", (M, N), self.dtype), c.number("parts")
        tile = c.WARP * self.lanes
        with c.launch((c.ceil(N, tile), parts), self.threads) as (bx, by, thread):
            self.M, self.K, self.N, self.thread, self.parts = M, K, N, thread, parts
            self.x, self.limit, self.limits, self.scale, self.center = x, limit, L, scale, center
            self.shared = c.Shared(max(self.step * 4 * (1 + self.rows), self.warps * self.rows * tile * 4) + 4 * max(16, self.warps))
            self.lane, self.warp = e.let(thread % c.WARP), e.let(tirx.truncdiv(thread, c.WARP))
            self.acc = [c.registers(self.lanes) for _ in range(self.rows)]
            for acc in self.acc:
                for i in range(self.lanes):
                    e.store(acc, e.zero(), i)
            column = e.let(bx * tile + self.lane * self.lanes)
            begin, end = (e.let(tirx.truncdiv((K + 15) // 16 * (by + i), parts) * 16) for i in range(2))
            end = e.let(e.minimum(end, K))
            with e.loop(c.ceil(e.maximum(end - begin, 0), self.step)) as step:
                count = self._select(e.let(begin + step * self.step), end)
                self._multiply(weight, count, column)
                c.barrier()
            self._add_warps(bx, by, sums, partial, counters, y)

    def _select(self, first: Any, end: Any) -> Any:
        """List the selected inputs of `first` ... at most a step further: where they are, and how much each row of x has of them."""
        flags, values = c.registers(OWN, "int32"), c.registers(OWN * self.rows)
        mine, limits = c.registers(1, "int32"), [e.let(e.load(self.limit, e.minimum(self.limits - 1, m))) for m in range(self.rows)]
        places = [e.let(e.minimum(self._at(first, i), self.K - 1)) for i in range(OWN)]
        numbers = [[c.read(self.x, e.minimum(self.M - 1, m), at) for m in range(self.rows)] for at in places]    # all at once
        e.store(mine, c.const(0), 0)
        for i in range(OWN):
            e.store(flags, c.const(0), i)
            with e.when(self._at(first, i) < end):
                self._look(flags, values, i, self._at(first, i), numbers[i], limits)
                e.store(mine, e.load(mine, 0) + e.load(flags, i), 0)
        before = c.of("int32", "warp_scan", e.load(mine, 0))
        totals = max(self.step * 4 * (1 + self.rows), self.warps * self.rows * c.WARP * self.lanes * 4)
        with e.when(tirx.EQ(self.lane, c.WARP - 1)):
            e.store(self._words, before, totals // 4 + self.warp)
        c.barrier()
        place, count = c.registers(1, "int32"), c.registers(1, "int32")
        e.store(place, before - e.load(mine, 0), 0)
        e.store(count, c.const(0), 0)
        for w in range(self.warps):
            total = e.let(e.load(self._words, totals // 4 + w))
            e.store(place, e.load(place, 0) + e.either(self.warp > w, total, c.const(0)), 0)
            e.store(count, e.load(count, 0) + total, 0)
        for i in range(OWN):
            with e.when(e.load(flags, i) > 0):
                at = e.let(e.load(place, 0))
                e.store(self._words, self._at(first, i), at)
                for m in range(self.rows):
                    e.store(self._floats, e.load(values, i * self.rows + m), self.step * (1 + m) + at)
                e.store(place, at + 1, 0)
        c.barrier()
        return e.let(e.load(count, 0))

    def _at(self, first: Any, i: int) -> Any:
        return first + self.thread * OWN + i

    def _look(self, flags: Any, values: Any, i: int, at: Any, numbers: list[Any], limits: list[Any]) -> None:
        scale = e.let(e.load(self.scale, at)) if self.how.scaled else e.constant(1.0, "float32")
        center = e.let(e.load(self.center, at)) if self.how.centered else e.zero()
        for m, number in enumerate(numbers):
            e.store(values, e.zero(), i * self.rows + m)
            with e.when(e.both(m < self.M, c.of("bool", "selected", number, center, scale, limits[m]))):
                e.store(flags, c.const(1), i)
                e.store(values, number - center, i * self.rows + m)

    def _multiply(self, weight: Any, count: Any, column: Any) -> None:
        """Add the listed rows of W, several of a warp at once."""
        ahead = self.ahead
        with e.when(column < self.N), e.loop(c.ceil(e.maximum(count - self.warp * ahead, 0), self.warps * ahead)) as i:
            first = e.let((i * self.warps + self.warp) * ahead)
            words = [c.registers(4, "uint32") for _ in range(ahead)]
            for j in range(ahead):
                row = e.let(e.load(self._words, e.minimum(first + j, count - 1)))
                c.do("load16_if", words[j].data, c.address(weight, row, column), first + j < count)
            for j in range(ahead):
                for m in range(self.rows):
                    factor = e.load(self._floats, self.step * (1 + m) + e.minimum(first + j, count - 1))
                    factor = e.let(e.either(first + j < count, factor, e.zero()))
                    c.do(f"add_{c.SHORT[self.dtype]}", self.acc[m].data, words[j].data, factor)

    def _add_warps(self, bx: Any, by: Any, sums: Any, partial: Any, counters: Any, y: Any) -> None:
        """Through shared memory: a warp's sums lie element by element over its lanes there, so that all banks are used."""
        tile = c.WARP * self.lanes
        for m in range(self.rows):
            for i in range(self.lanes):
                e.store(self._floats, e.load(self.acc[m], i), (self.warp * self.rows + m) * tile + i * c.WARP + self.lane)
        c.barrier()
        own = e.let(tirx.truncdiv(self.thread, self.lanes) + self.thread % self.lanes * c.WARP)
        column = e.let(bx * tile + self.thread)
        total = c.registers(self.rows)
        with e.when(e.both(self.thread < tile, column < self.N)):
            for m in range(self.rows):
                e.store(total, e.load(self._floats, m * tile + own), m)
                for w in range(1, self.warps):
                    e.store(total, e.load(total, m) + e.load(self._floats, (w * self.rows + m) * tile + own), m)
                with e.when(e.both(m < self.M, self.parts > 1)):
                    e.store(partial, e.load(total, m), by, m, column)
        with e.when(self.parts > 1):
            c.do("publish")
            c.barrier()
            with e.when(tirx.EQ(self.thread, 0)):
                e.store(self._words, c.of("int32", "take_number", c.address(counters, bx), self.parts), 0)
            c.barrier()
        self._finish(by, column, total, sums, partial, y)

    def _finish(self, by: Any, column: Any, total: Any, sums: Any, partial: Any, y: Any) -> None:
        """The block of a tile that comes last adds what all wrote."""
        last = e.let(tirx.Select(self.parts > 1, e.load(self._words, 0), self.parts - 1))
        with e.when(e.both(tirx.EQ(last, self.parts - 1), e.both(self.thread < c.WARP * self.lanes, column < self.N))):
            c.do("publish")
            for m in range(self.rows):
                with e.when(m < self.M):
                    with e.when(self.parts > 1):
                        self._add_parts(total, partial, m, column)
                    c.write(y, e.load(total, m) + e.load(sums, column), m, column)

    def _add_parts(self, total: Any, partial: Any, m: int, column: Any) -> None:
        """In order; several are read at once."""
        e.store(total, e.zero(), m)
        read = c.registers(TOGETHER)
        with e.loop(c.ceil(self.parts, TOGETHER)) as group:
            for j in range(TOGETHER):
                part = e.let(group * TOGETHER + j)
                e.store(read, e.load(partial, e.minimum(part, self.parts - 1), m, column), j)
            for j in range(TOGETHER):
                with e.when(group * TOGETHER + j < self.parts):
                    e.store(total, e.load(total, m) + e.load(read, j), m)

    @property
    def _words(self) -> Any:
        return self.shared.words

    @property
    def _floats(self) -> Any:
        return self.shared.floats
