"""Products of four warps at once, which read both operands from shared memory (group.cuh): on Hopper, whose tensor cores give half of their rate to
products of one warp.

A tile here has rows of 64 numbers. Straight, a row is 64 inputs of one row of x or one output; turned, it is one input of 64 of them, and more than
64 are several tiles behind each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c
from sparsify_compiler.codegen.cuda import tiles as t
from sparsify_compiler.codegen.cuda.finish import Result

WARPS, HIGH = 4, 64         # of a group: warps, rows of its sums
COLUMNS, CHUNKS = 64, 8     # of a tile: numbers of a row, and chunks
ROW, EIGHT = 128, 1024      # bytes: of a row of a tile, of eight of them
WAITED = "group_wait<0>"    # all products have their results
DEEP = 16                   # inputs of a product
ALIGN = 1024                # of tiles
PAD = 4                     # floats between the rows of results in shared memory, so that all banks are used


@dataclass(frozen=True)
class Parts(t.Tile):
    """A tile of more than 64 columns: several tiles behind each other."""

    def moved(self, by: Any) -> Parts:
        return Parts(self.shared, self.offset + by, self.rows, self.columns)

    def part(self, number: int | Any) -> t.Tile:
        """One of them."""
        return t.Tile(self.shared, self.offset + number * (self.rows * ROW), self.rows, COLUMNS)

    def at(self, row: Any, chunk: Any) -> Any:
        return self.part(tirx.truncdiv(chunk, CHUNKS)).at(row, chunk % CHUNKS)


def straight(tile: t.Tile, row: int | Any, k: int) -> Any:
    """The operand whose rows begin at this one, a multiple of 8, for the inputs from k on, a multiple of 16."""
    part = k // COLUMNS * tile.rows * ROW
    return c.of("uint64", "operand", tile.shared.at(tile.offset + part + row * ROW + 2 * (k % COLUMNS)), c.const(0), c.const(EIGHT))


def turned(tile: t.Tile, part: int | Any, k: int) -> Any:
    """The operand that begins with tile number `part` of those from this one on, for the inputs from k on, a multiple of 16."""
    size = tile.rows * ROW
    return c.of("uint64", "operand", tile.shared.at(tile.offset + part * size + k * ROW), c.const(size), c.const(EIGHT))


def product(dtype: str, columns: int, sums: Any, a: Any, b: Any, a_turned: bool = False, b_turned: bool = False) -> None:
    """sums [64, columns] += a b, under way until it is waited for; columns 64, 128 or 256."""
    c.do(f"group_product_{c.SHORT[dtype]}<{columns}, {int(a_turned)}, {int(b_turned)}>", sums.data, a, b)


@contextmanager
def products() -> Iterator[None]:
    """Products that go on together: what they take from registers is there before."""
    c.do("group_begin")
    yield
    c.do("group_end")


def product_sparse(dtype: str, columns: int, sums: Any, a: Any, b: Any, places: Any) -> None:
    """sums [64, columns] += a b with a of 2:4 sparsity: 16 of its 32 inputs are kept, at `places`, a word of each lane."""
    c.do(f"group_product_sparse_{c.SHORT[dtype]}<{columns}, 0>", sums.data, a, b, places)


def product_own(dtype: str, columns: int, sums: Any, a: Any, b: Any) -> None:
    """sums [64, columns] += a b with a in registers, four words of each lane, and b turned."""
    c.do(f"group_product_own_{c.SHORT[dtype]}<{columns}, 1>", sums.data, a.data, b)


def ahead(count: Any, stages: int, size: Any, copy: Callable[[Any, Any], None], work: Callable[[Any], None]) -> None:
    """As tiles.ahead: `count` steps whose copies run stages - 1 ahead; those of a step are asked for while the products of another go on."""
    t.copy_first(count, stages, size, copy)
    with e.loop(count) as step:
        c.do("copies_wait", c.const(stages - 2))
        c.do("copies_for_group")
        c.barrier()
        work(e.let(step % stages * size))
        t.copy_later(step, count, stages, size, copy)
        c.do(WAITED)


def result_bytes(rows: int, outputs: int) -> int:
    """Of the results of a block in shared memory."""
    return rows * (outputs + PAD) * 4


def write_turned(shared: c.Shared, sums: Any, result: Result, thread: Any, rows: int, outputs: int, first_row: Any, first_output: Any, M: Any,
                 N: Any) -> None:
    """Finish and write sums of y transposed, those of a group 64 outputs by `rows`, through shared memory: eight outputs of a row a thread."""
    line, warp, lane = outputs + PAD, e.let(tirx.truncdiv(thread, c.WARP)), e.let(thread % c.WARP)
    c.do("copies_wait", c.const(0))
    c.barrier()
    for n in range(rows // 8):
        for number in range(4):
            output = warp * 16 + number // 2 * 8 + tirx.truncdiv(lane, 4)
            e.store(shared.floats, e.load(sums, 4 * n + number), (8 * n + lane % 4 * 2 + number % 2) * line + output)
    c.barrier()
    with e.loop(c.const(rows * outputs // 8 // (outputs // HIGH * WARPS * c.WARP))) as i:
        number = e.let(thread + i * (outputs // HIGH * WARPS * c.WARP))
        row, column = e.let(tirx.truncdiv(number, outputs // 8)), e.let(number % (outputs // 8) * 8)
        m, n = e.let(first_row + row), e.let(first_output + column)
        with e.when(e.both(m < M, n < N)):
            for j in range(0, 8, 2):
                result.write_pair([e.load(shared.floats, row * line + column + k) + result.bias(n + k) for k in range(j, j + 2)], m, n + j)
