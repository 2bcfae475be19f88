"""attend_blocks for many query rows, on tensor cores: a block of threads takes rows of one query block of a head and goes through its list of keys.

Each warp owns sixteen of the rows; keys and values of a run are copied to shared memory while the run before is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c
from sparsify_compiler.codegen.cuda import groups as g
from sparsify_compiler.codegen.cuda import tiles as t
from sparsify_compiler.codegen.cuda.attend_arguments import Given
from sparsify_compiler.codegen.cuda.attend_rows import ROWS, GroupRows, Rows, inverse, log_of_sum


@dataclass(frozen=True)
class CudaAttendMany:
    """The arguments of attend_arguments.Given. width and value_width are multiples of 16; `warps` of sixteen query rows each, runs of `keys`.

    group: four warps multiply at once; widths 64 or 128, keys too.
    """

    dtype: str
    width: int
    value_width: int
    warps: int = 4
    keys: int = 64
    group: bool = False

    @property
    def name(self) -> str:
        return "cuda_attend_many"

    def compute(self) -> Any:
        return e.function("main", lambda: _Block(self).run())


class _Block:
    """What a block does."""

    def __init__(self, how: CudaAttendMany) -> None:
        self.how, self.rows, self.threads = how, how.warps * ROWS, how.warps * c.WARP

    def run(self) -> None:
        how = self.how
        self.a = a = Given(how.dtype, how.width, how.value_width, how.keys)
        a.numbers()
        parts = c.ceil(a.block_q, self.rows)
        with c.launch((a.NQ * parts, a.B * a.H), self.threads) as (bx, by, thread):
            self.thread, self.lane, self.warp = thread, e.let(thread % c.WARP), e.let(tirx.truncdiv(thread, c.WARP))
            block = e.let(a.NQ - 1 - tirx.truncdiv(bx, parts))     # where causal, the longest first
            self.first = e.let(block * a.block_q + bx % parts * self.rows)
            self.end = e.let(e.minimum(e.minimum(self.first + self.rows, (block + 1) * a.block_q), a.Q))
            with e.when(self.first < self.end):
                a.place(e.let(tirx.truncdiv(by, a.H)), e.let(by % a.H), block)
                self._tiles()
                self._attend()
                self._write()

    def _tiles(self) -> None:
        how = self.how
        query_bytes, key_bytes, value_bytes = self.rows * how.width * 2, how.keys * how.width * 2, how.keys * how.value_width * 2
        self.stage = key_bytes + value_bytes
        shared = c.Shared(query_bytes + 2 * self.stage, g.ALIGN if how.group else 128)
        tile = g.Parts if how.group else t.Tile
        self.query = tile(shared, 0, self.rows, how.width)
        self.keys = tile(shared, query_bytes, how.keys, how.width)
        self.values = tile(shared, query_bytes + key_bytes, how.keys, how.value_width)

    def _attend(self) -> None:
        a = self.a
        t.copy_rows(self.query, self.thread, self.threads, lambda row, chunk: (
            a.query(a.batch, a.head, e.minimum(self.first + row, self.end - 1), chunk * t.CHUNK), t.true()))
        self.found = c.registers(4, "int32")    # of the run that is copied: start, count, tile, column
        self._copy(c.const(0), 0)
        c.do("copies_end_group")
        self.state = (GroupRows if self.how.group else Rows)(self.how.dtype, self.how.width, self.how.value_width, self.how.keys, self.lane)
        c.do("copies_wait", c.const(0))
        c.barrier()
        self.state.take(self.query, self.warp * ROWS)
        with e.loop(a.total) as number:
            start, count, tile, column = (e.let(e.load(self.found, i)) for i in range(4))
            self._copy(e.let(number + 1), e.let((number + 1) % 2 * self.stage))
            c.do("copies_end_group")
            c.do("copies_wait", c.const(1))
            if self.how.group:
                c.do("copies_for_group")
            c.barrier()
            by = e.let(number % 2 * self.stage)
            row = e.let(self.first + self.warp * ROWS + tirx.truncdiv(self.lane, 4))
            with e.when(count > 0):
                self.state.run(self.keys.moved(by), self.values.moved(by), a.factor,
                               lambda key, half: a.allowed(row + 8 * half, key, start, count, tile, column), a.plain(self.first, start, count, tile))
            c.barrier()

    def _copy(self, number: Any, by: Any) -> None:
        with e.when(number < self.a.total):
            start, count, *_ = found = self.a.run(number, self.first, self.end)
            for i, value in enumerate(found):
                e.store(self.found, value, i)
            self.a.copy(self.keys.moved(by), self.values.moved(by), self.thread, self.threads, start, count)

    def _write(self) -> None:
        a, state = self.a, self.state
        state.add_lanes()
        for half in range(2):
            row = e.let(self.first + self.warp * ROWS + tirx.truncdiv(self.lane, 4) + 8 * half)
            top, total = e.let(e.load(state.top, half)), e.let(e.load(state.total, half))
            with e.when(row < self.end):
                share = inverse(top, total)
                with e.when(tirx.EQ(self.lane % 4, 0)):
                    e.store(a.lse, log_of_sum(top, total), a.batch, a.head, row)
                for n in range(self.how.value_width // 8):
                    pair = [e.load(state.sums, 4 * n + 2 * half + j) * share for j in range(2)]
                    c.do("write_word", a.out(a.batch, a.head, row, 8 * n + self.lane % 4 * 2), c.of("uint32", f"pair_{c.SHORT[a.dtype]}", *pair))
