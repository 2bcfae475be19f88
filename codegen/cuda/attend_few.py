"""attend_blocks for few query rows, as in decoding: what takes time is reading keys and values, so heads of a group read them once, together.

Sixteen rows (heads of a group, and query rows of them) are a fragment of tensor cores. The listed runs of keys are divided among parts, and among the
warps of a part, each of which copies its runs for itself, several ahead. What they found is merged in shared memory, and what the parts found by
the block that comes last, always in the same order (flash decoding).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c
from sparsify_compiler.codegen.cuda import tiles as t
from sparsify_compiler.codegen.cuda.attend_arguments import Given
from sparsify_compiler.codegen.cuda.attend_rows import ROWS, Rows, inverse, log_of_sum, lowest, or_zero

WARPS, STAGES = 4, 3
THREADS = WARPS * c.WARP


@dataclass(frozen=True)
class CudaAttendFew:
    """The arguments of attend_arguments.Given, with one block of query rows; before its numbers partial [parts, A, 16, E], tops [parts, A, 16, 2]
    and counters [A], zeros before and after, then int32 `together` and `parts`: heads of a group that are computed at once, A = B H / together,
    together Q <= 16, and parts of the keys. width and value_width are multiples of 16.
    """

    dtype: str
    width: int
    value_width: int
    keys: int = 16

    @property
    def name(self) -> str:
        return "cuda_attend_few"

    def compute(self) -> Any:
        return e.function("main", lambda: _Block(self).run())


class _Block:
    """What a block does."""

    def __init__(self, how: CudaAttendFew) -> None:
        self.how, self.width, self.last = how, how.width, how.value_width

    def run(self) -> None:
        how = self.how
        self.a = a = Given(how.dtype, self.width, self.last, how.keys)
        P, A = e.int32(), e.int32()
        self.partial, self.tops = c.parameter("partial", (P, A, ROWS, self.last), "float32"), c.parameter("tops", (P, A, ROWS, 2), "float32")
        self.counters = c.parameter("counters", (A,), "int32")
        self.together, self.parts = c.number("together"), c.number("parts")
        a.numbers()
        with c.launch((self.parts, A), THREADS) as (part, number, thread):
            self.part, self.number, self.thread = part, number, thread
            self.lane, self.warp = e.let(thread % c.WARP), e.let(tirx.truncdiv(thread, c.WARP))
            heads = e.let(tirx.truncdiv(a.H, self.together))
            self.head = e.let(number % heads * self.together)
            a.place(e.let(tirx.truncdiv(number, heads)), self.head, c.const(0))
            self.rows = e.let(self.together * a.Q)
            self._tiles()
            self._attend()
            self._merge_warps()
            with e.when(self.parts > 1):
                self._merge_parts()

    def _tiles(self) -> None:
        query_bytes, key_bytes, value_bytes = ROWS * self.width * 2, self.how.keys * self.width * 2, self.how.keys * self.last * 2
        self.stage = key_bytes + value_bytes
        self.merged = WARPS * ROWS * self.last      # floats of the sums of the warps
        self.shared = c.Shared(query_bytes + max(WARPS * STAGES * self.stage, 4 * (self.merged + WARPS * ROWS * 2)))
        own = e.let(query_bytes + self.warp * (STAGES * self.stage))
        self.query = t.Tile(self.shared, 0, ROWS, self.width)
        self.keys, self.values = t.Tile(self.shared, own, self.how.keys, self.width), t.Tile(self.shared, own + key_bytes, self.how.keys, self.last)
        self.floats_at = query_bytes // 4

    def _place(self, row: Any) -> tuple[Any, Any]:
        """Head and query row of one of the sixteen."""
        row = e.let(e.minimum(row, self.rows - 1))
        return e.let(self.head + tirx.truncdiv(row, self.a.Q)), e.let(row % self.a.Q)

    def _attend(self) -> None:
        a = self.a

        def of_query(row: Any, chunk: Any) -> tuple[Any, Any]:
            head, query = self._place(row)
            return a.query(a.batch, head, query, chunk * t.CHUNK), row < self.rows

        t.copy_rows(self.query, self.thread, THREADS, of_query)
        c.do("copies_end_group")
        begin, stop = (e.let(tirx.truncdiv(a.total * (self.part + i), self.parts)) for i in range(2))
        self.begin = e.let(begin + self.warp)
        self.count = e.let(c.ceil(e.maximum(stop - self.begin, 0), WARPS))
        for stage in range(STAGES - 1):
            self._copy(c.const(stage), c.const(stage * self.stage))
        self.state = Rows(self.how.dtype, self.width, self.last, self.how.keys, self.lane)
        c.do("copies_wait", c.const(STAGES - 1))
        c.barrier()
        self.state.take(self.query, c.const(0))
        with e.loop(self.count) as i:
            self._copy(e.let(i + STAGES - 1), e.let((i + STAGES - 1) % STAGES * self.stage))
            c.do("copies_wait", c.const(STAGES - 1))
            c.do("warp_barrier")
            start, count, tile, column = a.run(e.let(self.begin + i * WARPS), c.const(0), a.Q)
            by = e.let(i % STAGES * self.stage)
            rows = [self._place(tirx.truncdiv(self.lane, 4) + 8 * half)[1] for half in range(2)]
            with e.when(count > 0):
                self.state.run(self.keys.moved(by), self.values.moved(by), a.factor,
                               lambda key, half: a.allowed(rows[half], key, start, count, tile, column), a.plain(c.const(0), start, count, tile))
            c.do("warp_barrier")
        c.do("copies_wait", c.const(0))
        c.barrier()

    def _copy(self, i: Any, by: Any) -> None:
        with e.when(i < self.count):
            start, count, _, _ = self.a.run(e.let(self.begin + i * WARPS), c.const(0), self.a.Q)
            self.a.copy(self.keys.moved(by), self.values.moved(by), self.lane, c.WARP, start, count)
        c.do("copies_end_group")

    def _merge_warps(self) -> None:
        state, floats, at = self.state, self.shared.floats, self.floats_at
        state.add_lanes()
        for half in range(2):
            row = e.let(self.warp * ROWS + tirx.truncdiv(self.lane, 4) + 8 * half)
            for n in range(self.last // 8):
                for j in range(2):
                    e.store(floats, e.load(state.sums, 4 * n + 2 * half + j), at + row * self.last + 8 * n + self.lane % 4 * 2 + j)
            with e.when(tirx.EQ(self.lane % 4, 0)):
                e.store(floats, e.load(state.top, half), at + self.merged + 2 * row)
                e.store(floats, e.load(state.total, half), at + self.merged + 2 * row + 1)
        c.barrier()

        def of(row: Any, column: Any) -> tuple[Any, Any, Any]:
            tops = at + self.merged + 2 * row
            return self._combine(c.const(WARPS), lambda w: e.load(floats, tops + w * (2 * ROWS)), lambda w: e.load(floats, tops + w * (2 * ROWS) + 1),
                                 lambda w: e.load(floats, at + (w * ROWS + row) * self.last + column))

        self._each(of, self._store)

    def _merge_parts(self) -> None:
        c.do("publish")
        c.barrier()
        with e.when(tirx.EQ(self.thread, 0)):
            e.store(self.shared.words, c.of("int32", "take_number", c.address(self.counters, self.number), self.parts), 0)
        c.barrier()
        with e.when(tirx.EQ(e.load(self.shared.words, 0), self.parts - 1)):
            c.do("publish")

            def of(row: Any, column: Any) -> tuple[Any, Any, Any]:
                where = (self.number, row)
                return self._combine(self.parts, lambda p: e.load(self.tops, p, *where, 0), lambda p: e.load(self.tops, p, *where, 1),
                                     lambda p: e.load(self.partial, p, *where, column))

            self._each(of, self._write)

    def _each(self, of: Callable[..., Any], store: Callable[..., None]) -> None:
        """For every row and column that there is."""
        with e.loop(c.const(-(-ROWS * self.last // THREADS))) as i:
            number = e.let(self.thread + i * THREADS)
            row, column = e.let(tirx.truncdiv(number, self.last)), e.let(number % self.last)
            with e.when(row < self.rows):
                store(row, column, *of(row, column))

    def _combine(self, count: Any, top: Callable[..., Any], total: Callable[..., Any], sums: Callable[..., Any]) -> tuple[Any, Any, Any]:
        """Largest score, total and sum of several that have their own."""
        best, all_of, value = (c.registers(1) for _ in range(3))
        e.store(best, lowest(), 0)
        with e.loop(count) as i:
            e.store(best, c.of("float32", "larger", e.load(best, 0), top(i)), 0)
        base = or_zero(e.let(e.load(best, 0)))
        for one in (all_of, value):
            e.store(one, e.zero(), 0)
        with e.loop(count) as i:
            factor = c.of("float32", "exp2_of", top(i) - base)
            e.store(all_of, e.load(all_of, 0) + factor * total(i), 0)
            e.store(value, e.load(value, 0) + factor * sums(i), 0)
        return tuple(e.let(e.load(one, 0)) for one in (best, all_of, value))

    def _store(self, row: Any, column: Any, top: Any, total: Any, value: Any) -> None:
        """What this part found: for the last block, or written where there is one part."""
        def keep() -> None:
            e.store(self.partial, value, self.part, self.number, row, column)
            with e.when(tirx.EQ(column, 0)):
                e.store(self.tops, top, self.part, self.number, row, 0)
                e.store(self.tops, total, self.part, self.number, row, 1)

        e.choose(self.parts > 1, keep, lambda: self._write(row, column, top, total, value))

    def _write(self, row: Any, column: Any, top: Any, total: Any, value: Any) -> None:
        head, query = self._place(row)
        c.do(f"write_{c.SHORT[self.how.dtype]}", self.a.out(self.a.batch, head, query, column), value * inverse(top, total))
        with e.when(tirx.EQ(column, 0)):
            e.store(self.a.lse, log_of_sum(top, total), self.a.batch, head, query)
