"""Rows of x times the matrix of the expert that each chose (experts_ffn), on tensor cores: one launch for all experts, nothing padded in memory.

Places of rows are sorted by expert. A block takes a tile of rows of one expert, which it finds by the ends of the experts' tiles, and gathers them by
their numbers while it copies them. MegaBlocks (arXiv:2211.15841), section 5, has the same indirection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c
from sparsify_compiler.codegen.cuda import groups as g
from sparsify_compiler.codegen.cuda import tiles as t
from sparsify_compiler.codegen.cuda.finish import activated

STAGES = 4                                          # steps under way
RAISED = {"drelu": "relu"}                          # what up has an activation of its own in: its name


@dataclass(frozen=True)
class CudaGrouped:
    """f(x [X, K], rows [P], ends [E], firsts [E + 1], first [E, N, K], second [E, N, K], bias [A, N], second_bias [A, N], factors [P], y [P, N],
    tiles).

    x and the matrices of `dtype` (16 bits), K and N multiples of 8. rows int32: the row of x at each place; places lie by expert, those of expert e
    from firsts[e] on; ends[e] counts the tiles of `tall` rows up to those of expert e, of at most `tiles`. Biases and factors float32.
    gated: y = activation(first x + bias) * (second x + second_bias), with the biases that there are (`biased`, `raised`); else
    activation(first x + bias), "" for none, times the place's factor where `weighted`. y is of dtype `result`. group: products of four warps at once
    (groups.py), `tall` a multiple of 64.
    """

    dtype: str
    gated: bool
    activation: str = ""
    weighted: bool = False
    biased: bool = False
    raised: bool = False
    result: str = ""
    tall: int = 128
    group: bool = False

    @property
    def name(self) -> str:
        return "cuda_grouped"

    def compute(self) -> Any:
        return e.function("main", lambda: _Block(self).run())


class _Block:
    """What a block does."""

    def __init__(self, how: CudaGrouped) -> None:
        self.how = how
        self.depth, self.across = (64, 256) if how.group else (32, 128)     # inputs of a step, columns of both matrices
        self.own_rows = 16 if how.group else 32     # of a warp
        self.row_warps, self.column_warps = how.tall // self.own_rows, 1 if how.group else 2 if how.tall > self.own_rows else 4
        self.threads = self.row_warps * self.column_warps * c.WARP
        self.own = self.across // self.column_warps     # columns of a warp, half of them of the second matrix where there is one
        self.columns = self.across // 2 if how.gated else self.across

    def run(self) -> None:
        how = self.how
        X, self.K, self.N, P, E = (e.int32() for _ in range(5))
        self.x = c.parameter("x", (X, self.K), how.dtype)
        self.rows, self.ends, self.firsts = (c.parameter(name, (n,), "int32") for name, n in (("rows", P), ("ends", E), ("firsts", E + 1)))
        self.E = E
        second = (E, self.N, self.K) if how.gated else (e.int32(), e.int32(), e.int32())
        self.first, self.second = c.parameter("first", (E, self.N, self.K), how.dtype), c.parameter("second", second, how.dtype)
        self.bias, self.second_bias = (c.parameter(name, (e.int32(), e.int32()), "float32") for name in ("bias", "second_bias"))
        self.factors = c.parameter("factors", (e.int32(),), "float32")
        self.y = c.parameter("y", (P, self.N), how.result or how.dtype)
        tiles = c.number("tiles")
        self.flat = [c.flat(weight, E, self.N, self.K) for weight in (self.first, self.second)]
        with c.launch((tiles, c.ceil(self.N, self.columns)), self.threads) as (bx, by, thread), e.when(bx < e.load(self.ends, E - 1)):
            self.thread, self.lane, warp = thread, e.let(thread % c.WARP), e.let(tirx.truncdiv(thread, c.WARP))
            self.row, self.place = e.let(tirx.truncdiv(warp, self.column_warps) * self.own_rows), e.let(warp % self.column_warps)
            self._find(bx)
            self.column = e.let(by * self.columns)
            x_bytes, self.stage = how.tall * self.depth * 2, (how.tall + self.across) * self.depth * 2
            shared = c.Shared(STAGES * self.stage, g.ALIGN if how.group else 128)
            self.x_tile, self.w_tile = t.Tile(shared, 0, how.tall, self.depth), t.Tile(shared, x_bytes, self.across, self.depth)
            self.sums = t.zeros(self.own_rows // 16 * self.own // 8 * 4)
            self._steps()
            self._write()

    def _find(self, tile: Any) -> None:
        """The expert of a tile: the first whose tiles end behind it; its first place and how many there are from there on."""
        low, high = c.registers(1, "int32"), c.registers(1, "int32")
        e.store(low, c.const(0), 0)
        e.store(high, self.E - 1, 0)
        with c.builder.While(e.load(low, 0) < e.load(high, 0)):
            middle = e.let(tirx.truncdiv(e.load(low, 0) + e.load(high, 0), 2))
            e.choose(e.load(self.ends, middle) > tile, lambda: e.store(high, middle, 0), lambda: e.store(low, middle + 1, 0))
        self.expert = e.let(e.load(low, 0))
        before = e.let(e.either(self.expert > 0, e.load(self.ends, e.maximum(self.expert - 1, 0)), c.const(0)))
        self.start = e.let(e.load(self.firsts, self.expert) + (tile - before) * self.how.tall)
        self.count = e.let(e.minimum(e.load(self.firsts, self.expert + 1) - self.start, self.how.tall))
        self.base = e.let(e.cast("int64", self.expert) * e.cast("int64", self.N) * e.cast("int64", self.K))

    def _steps(self) -> None:
        count = c.ceil(self.K, self.depth)
        chunks = self.depth // t.CHUNK
        self.numbers = c.registers(-(-self.how.tall * chunks // self.threads), "int32")
        for i, first in enumerate(range(0, self.how.tall * chunks, self.threads)):
            row = e.let(tirx.truncdiv(self.thread + first, chunks))
            e.store(self.numbers, e.load(self.rows, self.start + e.minimum(row, self.count - 1)), i)
        (g if self.how.group else t).ahead(count, STAGES, self.stage, self._copy, self._multiply_group if self.how.group else self._multiply)

    def _copy(self, step: Any, by: Any) -> None:
        at = iter(range(self.how.tall))

        def of_x(row: Any, chunk: Any) -> tuple[Any, Any]:
            k = e.let(step * self.depth + chunk * t.CHUNK)
            there = e.both(row < self.count, k < self.K)
            return c.address(self.x, e.load(self.numbers, next(at)), e.either(k < self.K, k, 0)), there

        def of(flat: Any) -> Any:
            def of_w(row: Any, chunk: Any) -> tuple[Any, Any]:
                k, column = e.let(step * self.depth + chunk * t.CHUNK), e.let(self.column + row)
                there = e.let(e.both(column < self.N, k < self.K))
                index = self.base + e.cast("int64", e.either(there, column, 0)) * e.cast("int64", self.K)
                return c.address(flat, index + e.cast("int64", e.either(there, k, 0))), there
            return of_w

        t.copy_rows(self.x_tile.moved(by), self.thread, self.threads, of_x)
        for i, flat in enumerate(self.flat if self.how.gated else self.flat[:1]):  # one tile behind the other: rows go on counting
            part = t.Tile(self.w_tile.shared, self.w_tile.offset + i * self.columns * self.depth * 2, self.columns, self.depth)
            t.copy_rows(part.moved(by), self.thread, self.threads, of(flat))

    def _groups(self) -> list[Any]:
        """Where the sixteens of this warp's columns begin in the tile: of the first matrix, then of the second."""
        if not self.how.gated:
            return [e.let(self.place * self.own + 16 * j) for j in range(self.own // 16)]
        half = self.own // 2
        return [e.let(which * self.columns + self.place * half + 16 * j) for which in range(2) for j in range(half // 16)]

    def _multiply_group(self, by: Any) -> None:
        x, w = self.x_tile.moved(by), self.w_tile.moved(by)
        first = e.let(tirx.truncdiv(self.row, g.HIGH) * g.HIGH)
        with g.products():
            for k in range(0, self.depth, g.DEEP):
                g.product(self.how.dtype, self.across, self.sums, g.straight(x, first, k), g.straight(w, 0, k))

    def _multiply(self, by: Any) -> None:
        x, w, groups = self.x_tile.moved(by), self.w_tile.moved(by), self._groups()
        for k in range(self.depth // 16):
            a = [c.registers(4, "uint32") for _ in range(self.own_rows // 16)]
            for i, fragment in enumerate(a):
                x.matrices(fragment.data, self.row + 16 * i, 2 * k, self.lane, down=True, turned=False)
            for j, group in enumerate(groups):
                b = c.registers(4, "uint32")
                w.matrices(b.data, group, 2 * k, self.lane, down=False, turned=False)
                for i, fragment in enumerate(a):
                    for n in range(2):
                        t.product(self.how.dtype, t.part(self.sums, self._at(i, 2 * j + n)), fragment.data, t.part(b, 2 * n))

    def _at(self, i: int, n: int) -> int:
        return (i * (self.own // 8) + n) * 4

    def _write(self) -> None:
        eights = self.own // 16 if self.how.gated else self.own // 8
        for n in range(eights):
            column = e.let(self.column + self.place * (self.own // 2 if self.how.gated else self.own) + 8 * n + self.lane % 4 * 2)
            with e.when(column < self.N):
                for i in range(self.own_rows // 16):
                    for half in range(2):
                        row = e.let(self.row + 16 * i + 8 * half + tirx.truncdiv(self.lane, 4))
                        with e.when(row < self.count):
                            self._pair(e.let(self.start + row), column, [self._value(i, n, eights, 2 * half + j, column + j) for j in range(2)])

    def _value(self, i: int, n: int, eights: int, at: int, column: Any) -> Any:
        first = e.load(self.sums, self._at(i, n) + at)
        if self.how.biased:
            first = first + e.load(self.bias, self.expert, column)
        value = activated(self.how.activation, e.let(first))
        if self.how.gated:
            second = e.load(self.sums, self._at(i, n + eights) + at)
            if self.how.raised:
                second = second + e.load(self.second_bias, self.expert, column)
            value = value * activated(RAISED.get(self.how.activation, ""), e.let(second))
        return value

    def _pair(self, place: Any, column: Any, values: list[Any]) -> None:
        if self.how.weighted:
            factor = e.let(e.load(self.factors, place))
            values = [value * factor for value in values]
        kind = self.how.result or self.how.dtype
        if kind == "float32":
            for j, value in enumerate(values):
                e.store(self.y, value, place, column + j)
        else:
            c.do("write_word", c.address(self.y, place, column), c.of("uint32", f"pair_{c.SHORT[kind]}", *values))


@dataclass(frozen=True)
class CudaCombine:
    """f(parts [P, N], places [M, k], y [M, N]): y = the sum over a row's places, -1 for none, in order; parts float32, places int32."""

    dtype: str

    @property
    def name(self) -> str:
        return "cuda_combine"

    def compute(self) -> Any:
        def body() -> None:
            P, N, M, k = (e.int32() for _ in range(4))
            parts, places = c.parameter("parts", (P, N), "float32"), c.parameter("places", (M, k), "int32")
            y = c.parameter("y", (M, N), self.dtype)
            with c.launch((c.ceil(N, 256), M), 256) as (bx, row, thread):
                column = e.let(bx * 256 + thread)
                with e.when(column < N):
                    total = t.zeros(1)
                    with e.loop(k) as j:
                        place = e.let(e.load(places, row, j))
                        with e.when(place >= 0):
                            e.store(total, e.load(total, 0) + e.load(parts, place, column), 0)
                    c.write(y, e.load(total, 0), row, column)

        return e.function("main", body)
