"""A matrix of 16-bit numbers transposed, by tiles in shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.cuda import emit as c

TILE, THREADS = 64, 256
LINE = TILE + 2     # numbers from row to row in shared memory: an odd number of words, so that a column lies in all banks


@dataclass(frozen=True)
class CudaTurn:
    """f(x [M, K], y [K, Mp]): y[k, m] = x[m, k], zeros from M to Mp; int16, Mp is M rounded up to a multiple of 8, K is even."""

    @property
    def name(self) -> str:
        return "cuda_turn"

    def compute(self) -> Any:
        return e.function("main", _block)


def _block() -> None:
    M, K, Mp = (e.int32() for _ in range(3))
    x, y = c.parameter("x", (M, K), "int16"), c.parameter("y", (K, Mp), "int16")
    with c.launch((c.ceil(Mp, TILE), c.ceil(K, TILE)), THREADS) as (bx, by, thread):
        shared = c.Shared(TILE * LINE * 2)
        halves = c.builder.decl_buffer((TILE * LINE,), "int16", data=shared.buffer.data, scope="shared.dyn")
        for i in range(TILE * TILE // 2 // THREADS):    # two numbers of a row a thread
            number = e.let(thread + i * THREADS)
            row, pair = e.let(tirx.truncdiv(number, TILE // 2)), e.let(number % (TILE // 2))
            m, k = e.let(bx * TILE + row), e.let(by * TILE + 2 * pair)
            inside = e.let(e.both(m < M, k < K))
            place = tirx.truncdiv(row * LINE, 2) + pair
            word = c.of("int32", "read_word", c.address(x, e.either(inside, m, 0), e.either(inside, k, 0)))
            e.store(shared.words, e.either(inside, word, c.const(0)), place)
        c.barrier()
        for i in range(TILE * TILE // 8 // THREADS):    # eight of a column
            number = e.let(thread + i * THREADS)
            column, eight = e.let(tirx.truncdiv(number, TILE // 8)), e.let(number % (TILE // 8))
            k, m = e.let(by * TILE + column), e.let(bx * TILE + eight * 8)
            with e.when(e.both(k < K, m < Mp)):
                words = c.registers(4, "int32")
                for j in range(4):
                    low, high = (e.load(halves, (eight * 8 + 2 * j + n) * LINE + column) for n in range(2))
                    e.store(words, c.of("int32", "pair_of", low, high), j)
                c.do("write16", c.address(y, k, m), words.data)


__all__ = ["CudaTurn"]
