"""Experts in bfloat16 without tiles: words of two inputs, multiplied with a weight's two by one instruction (AVX512_BF16, Arm's BFDOT).

Each product is exact, sums are float32, denormals count as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen import emit_tiles as t
from sparsify_compiler.codegen.kernels.expert_cores import TILES, Fma, Pairs
from sparsify_compiler.codegen.kernels.experts_layout import ExpertsArguments, ExpertsLayout
from sparsify_compiler.codegen.kernels.products import LANES, some_at_a_time


def dots(weights: Any, rows: Sequence[Any], inputs: Any, at: Any, size: Any) -> Any:
    """The products of these 16 rows of weights with `size` inputs, words from inputs[at] on, one a lane. Inside of `with e.llvm(vectors.dot)`.

    Weights come in no other form than they are loaded in: upcast to float32, two instructions and two FMAs a word, a token takes a fifth longer.
    """
    return some_at_a_time(rows, lambda some: _sums(weights, some, inputs, at, size))


def _sums(weights: Any, rows: Sequence[Any], inputs: Any, at: Any, size: Any) -> list[e.Register]:
    width = e.lanes()
    sums = [e.Register(width, e.broadcast(e.zero(), width)) for _ in rows]
    with e.loop(e.floordiv(size, 2 * width)) as j:
        value, column = e.let(e.load(inputs, at + j * width, lanes=width)), e.wide(j * width)
        for row, total in zip(rows, sums, strict=True):
            total.set(e.external(total.dtype, "dot_bf16", total.get(), value, e.let(e.load(weights, row, column, lanes=width))))
    return sums


def copy_words(inputs: Any, at: Any, x: Any, row: Any, size: Any) -> None:
    """A row of x as it is, in words, from inputs[at] on."""
    with e.loop(e.floordiv(size, 2 * LANES)) as j:
        e.store(inputs, e.reinterpret("int32", e.load(x, row, j * (2 * LANES), lanes=2 * LANES), LANES), at + j * LANES, lanes=LANES)


def keep_words(words: Any, value: Any, at: Any) -> None:
    """16 float32, rounded, as 8 words from words[at] on."""
    low, high = (e.let(e.shuffle(value, value, [2 * (i % 8) + half for i in range(LANES)])) for half in range(2))
    made = t.bfloat16_pairs(low, high) if e.vectors().masked else e.rounded_pairs(low, high, LANES)
    e.store(words, e.part(e.let(made), 0, LANES // 2), at, lanes=LANES // 2)


class Dot(Pairs, Fma):
    """Words of two, as for tiles; their products as those of vectors.

    Of one row a word of weights is an instruction's sixteenth (of Arm's, a fourth), and of a whole unit a whole one, however many lanes are empty.
    """

    few = 8

    def __init__(self, a: ExpertsArguments, how: ExpertsLayout) -> None:
        super().__init__(a, how)
        self.depth, self.of_word = 2 * e.lanes(), 1
        self.outputs_at_once, self.across = TILES[e.lanes()]

    def words(self, width: Any) -> Any:
        return e.floordiv(width, 2)

    def factors(self, word: Any, part: int) -> Callable[[int], Callable[[e.Register, Any], None]]:
        lane = e.vectors().by_element
        every = word if lane else e.let(e.broadcast(word, e.lanes()))

        def step(number: int) -> Callable[[e.Register, Any], None]:
            name = f"dot_bf16_{number}" if lane else "dot_bf16"
            return lambda total, value: total.set(e.external(total.dtype, name, total.get(), value, every))

        return step

    def copy_row(self, packed: Any, at: Any, row: Any) -> None:
        copy_words(packed, at, self.a.x, row, self.a.K)

    def length(self, width: Any) -> Any:
        return e.floordiv(width, 2)

    def row_products(self, weight: Any, rows: list[Any], inputs: Any, at: Any, size: Any) -> Any:
        return dots(weight, rows, inputs, at, size)

    def keep_row(self, hidden: Any, value: Any, at: Any) -> None:
        keep_words(hidden, value, at)
