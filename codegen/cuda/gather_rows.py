"""Few rows of x times the weights of the inputs that they select (select_linear), W input by input: what a language model does for each token.

A block takes some columns of W, and the inputs, or a part of them where several blocks are a cluster. Each warp selects among inputs of its own, in
pieces that alternate over warps and blocks, lists them in shared memory without waiting for the others, and reads their rows of W, 16 bytes a lane,
several rows at once. Sums are added by lanes, then over warps and blocks in shared memory, always in the same order: where blocks are a cluster,
each warp writes its own to the block that finishes these columns. TEAL (arXiv:2408.14690), section 4.3, fuses the selection likewise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c

SPLIT = 4       # lanes that add what warps and blocks found for a column
PAD = 8         # floats from row to row of that, beside the columns, so that these lanes read different banks


@dataclass(frozen=True)
class CudaGatherRows:
    """f(x [M, K], limit [L], scale [K], center [K], weight [K, N], sums [N], y [M, N]).

    x of `source`, W and y of `dtype`, the rest float32; L is 1 or M; M is at most `rows`; N is a multiple of the elements in 16 bytes.
    sums is what y begins from: bias, and what the centres give. `across` lanes read a row of a block's columns, 16 bytes each; a lane reads `ahead`
    rows at once. `cluster` blocks share the inputs.
    """

    dtype: str
    rows: int
    scaled: bool = False
    centered: bool = False
    source: str = ""
    across: int = 8
    cluster: int = 1
    warps: int = 16
    ahead: int = 8

    @property
    def name(self) -> str:
        return "cuda_gather_rows"

    @property
    def columns(self) -> int:
        """Of a block."""
        return self.across * 16 // c.SIZE[self.dtype]

    def compute(self) -> Any:
        return e.function("main", lambda: _Block(self).run())


class _Block:
    """What a block does."""

    def __init__(self, how: CudaGatherRows) -> None:
        self.how, self.rows, self.lanes, self.threads = how, how.rows, 16 // c.SIZE[how.dtype], how.warps * c.WARP
        self.pieces = 8 if how.rows == 1 else 4     # of 32 inputs, which a warp looks at in a step
        self.listed = self.pieces * c.WARP
        self.entry = 1 + how.rows                   # words of an input that is listed
        self.own = how.columns // how.cluster       # columns that this block finishes
        self.line = self.own + PAD
        self.parts = how.warps * how.cluster        # sums of each of them
        self.handed = how.warps * self.listed * self.entry  # where they lie, behind the lists

    def run(self) -> None:
        how = self.how
        M, K, N, L = (e.int32() for _ in range(4))
        self.M, self.K, self.N, self.limits = M, K, N, L
        self.x, self.limit = c.parameter("x", (M, K), how.source or how.dtype), c.parameter("limit", (L,), "float32")
        self.scale, self.center = (c.parameter(name, (e.int32(),), "float32") for name in ("scale", "center"))
        self.weight, sums = c.parameter("weight", (K, N), how.dtype), c.parameter("sums", (N,), "float32")
        y = c.parameter("y", (M, N), how.dtype)
        blocks = (c.ceil(N, how.columns), c.const(how.cluster)) if how.cluster > 1 else (c.ceil(N, how.columns),)
        with c.launch(blocks, self.threads) as (bx, *by, thread):
            self.by, self.thread = by[0] if by else c.const(0), thread
            self.shared = c.Shared((self.handed + self.rows * self.parts * self.line) * 4)
            self.lane, self.warp = e.let(thread % c.WARP), e.let(tirx.truncdiv(thread, c.WARP))
            if how.cluster > 1:
                c.do("cluster_arrive")
            column = e.let(bx * how.columns + self.by * self.own + tirx.truncdiv(thread, SPLIT))
            first = c.registers(1)
            with e.when(tirx.truncdiv(thread, SPLIT) < self.own):
                e.store(first, c.of("float32", "load_now", c.address(sums, e.minimum(column, N - 1))), 0)
            self._all_inputs(e.let(e.minimum(bx * how.columns + self.lane % how.across * self.lanes, N - self.lanes)))
            self._hand_over()
            self._finish(y, column, first)

    def _all_inputs(self, column: Any) -> None:
        self.acc = c.registers(self.rows * self.lanes)
        for i in range(self.rows * self.lanes):
            e.store(self.acc, e.zero(), i)
        self.numbers = c.registers(self.pieces * self.rows)
        limits = [e.let(e.load(self.limit, e.minimum(self.limits - 1, m))) for m in range(self.rows)]
        count = e.let(c.ceil(self.K, self.listed * self.parts))
        kind, beside = c.SHORT[self.how.dtype].capitalize(), c.WARP // self.how.across
        self._read(c.const(0))
        with e.loop(count) as step:
            listed = self._select(step, limits)
            with e.when(step + 1 < count):
                self._read(e.let(step + 1))     # while rows of W come
            c.do(f"add_rows<{kind}, {self.rows}, {self.how.ahead}, {beside}>", self.acc.data,
                 self.shared.at((self.warp * self.listed + tirx.truncdiv(self.lane, self.how.across)) * (4 * self.entry)), listed,
                 tirx.truncdiv(self.lane, self.how.across), c.address(self.weight, 0, column))
            c.do("warp_barrier")

    def _at(self, step: Any, piece: int) -> Any:
        """The lane's input of a piece."""
        return (((step * self.pieces + piece) * self.how.warps + self.warp) * self.how.cluster + self.by) * c.WARP + self.lane

    def _read(self, step: Any) -> None:
        for i in range(self.pieces):
            at = e.let(e.minimum(self._at(step, i), self.K - 1))
            for m in range(self.rows):
                e.store(self.numbers, c.read(self.x, e.minimum(self.M - 1, m), at), i * self.rows + m)

    def _select(self, step: Any, limits: list[Any]) -> Any:
        """List the selected inputs of a step: where their rows are, and how much each row of x has of them. How many there are."""
        count, flag, values = c.registers(1, "int32"), c.registers(1, "int32"), c.registers(self.rows)
        below = e.let(e.cast("uint32", (c.const(1) << self.lane) - 1))
        e.store(count, c.const(0), 0)
        for i in range(self.pieces):
            at = e.let(self._at(step, i))
            e.store(flag, c.const(0), 0)
            with e.when(at < self.K):
                self._look(flag, values, i, at, limits)
            found = c.of("uint32", "votes", e.load(flag, 0) > 0)
            with e.when(e.load(flag, 0) > 0):
                place = e.let((self.warp * self.listed + e.load(count, 0) + c.of("int32", "bits_in", found & below)) * self.entry)
                e.store(self.shared.words, at * tirx.truncdiv(self.N, self.lanes), place)
                for m in range(self.rows):
                    e.store(self.shared.floats, e.load(values, m), place + 1 + m)
            e.store(count, e.load(count, 0) + c.of("int32", "bits_in", found), 0)
        c.do("warp_barrier")
        return e.let(e.load(count, 0))

    def _look(self, flag: Any, values: Any, i: int, at: Any, limits: list[Any]) -> None:
        scale = e.let(e.load(self.scale, at)) if self.how.scaled else e.constant(1.0, "float32")
        center = e.let(e.load(self.center, at)) if self.how.centered else e.zero()
        for m in range(self.rows):
            number = e.let(e.load(self.numbers, i * self.rows + m))
            e.store(values, e.zero(), m)
            with e.when(e.both(m < self.M, c.of("bool", "selected", number, center, scale, limits[m]))):
                e.store(flag, c.const(1), 0)
                e.store(values, number - center, m)

    def _hand_over(self) -> None:
        """The sums of a warp to the blocks that finish them: over its lanes first."""
        how, acc = self.how, self.acc
        for i in range(self.rows * self.lanes):
            bit = how.across
            while bit < c.WARP:
                e.store(acc, e.load(acc, i) + c.of("float32", "shuffle_xor", e.load(acc, i), c.const(bit)), i)
                bit *= 2
        if how.cluster > 1:
            c.do("cluster_wait")    # all have begun
        with e.when(self.lane < how.across):
            for m in range(self.rows):
                for i in range(0, self.lanes, 4):
                    column = e.let(self.lane * self.lanes + i)
                    row = (self.by * how.warps + self.warp) * self.rows + m
                    to = self.shared.at(e.let(self.handed + row * self.line + column % self.own) * 4)
                    numbers = c.address(acc, m * self.lanes + i)
                    if how.cluster > 1:
                        c.do("push16", to, tirx.truncdiv(column, self.own), numbers)
                    else:
                        c.do("store16", to, numbers)
        if how.cluster > 1:
            c.do("cluster_arrive")
            c.do("cluster_wait")
        else:
            c.barrier()

    def _finish(self, y: Any, column: Any, first: Any) -> None:
        """A column's sums, some lanes each."""
        own, inside, total = e.let(self.thread % SPLIT), e.let(tirx.truncdiv(self.thread, SPLIT)), c.registers(1)
        for m in range(self.rows):
            e.store(total, e.zero(), 0)
            with e.when(inside < self.own):
                for i in range(self.parts // SPLIT):
                    row = (i * SPLIT + own) * self.rows + m
                    e.store(total, e.load(total, 0) + e.load(self.shared.floats, self.handed + row * self.line + inside), 0)
            for bit in (1, 2):
                e.store(total, e.load(total, 0) + c.of("float32", "shuffle_xor", e.load(total, 0), c.const(bit)), 0)
            with e.when(e.both(e.both(inside < self.own, m < self.M), e.both(tirx.EQ(own, 0), column < self.N))):
                c.write(y, e.load(total, 0) + e.load(first, 0), m, column)
