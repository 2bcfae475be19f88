"""Experts in bfloat16 without tiles: words of two inputs, multiplied with a weight's two by one instruction (AVX512_BF16).

Each product is exact, sums are float32, denormals count as zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen import emit_tiles as t
from sparsify_compiler.codegen.kernels.expert_cores import Fma, Pairs
from sparsify_compiler.codegen.kernels.expert_order import Order
from sparsify_compiler.codegen.kernels.experts_layout import ExpertsArguments, ExpertsLayout
from sparsify_compiler.codegen.kernels.products import LANES, added

DOT = Path(__file__).with_name("dot_bf16.ll")


def dots(weights: Any, rows: Sequence[Any], inputs: Any, at: Any, size: Any) -> Any:
    """The products of these 16 rows of weights with `size` inputs, words from inputs[at] on, one a lane. Inside of `with e.llvm(DOT.read_text())`.

    Weights come in no other form than they are loaded in: upcast to float32, two instructions and two FMAs a word, a token takes a fifth longer.
    """
    rows, sums = [e.wide(row) for row in rows], [e.Register(LANES, e.broadcast(e.zero(), LANES)) for _ in rows]
    with e.loop(e.floordiv(size, 2 * LANES)) as j:
        value, column = e.let(e.load(inputs, at + j * LANES, lanes=LANES)), e.wide(j * LANES)
        for row, total in zip(rows, sums, strict=True):
            total.set(e.external(total.dtype, "dot_bf16", total.get(), value, e.let(e.load(weights, row, column, lanes=LANES))))
    return added(e.transpose([e.let(total.get()) for total in sums]))


def copy_words(inputs: Any, at: Any, x: Any, row: Any, size: Any) -> None:
    """A row of x as it is, in words, from inputs[at] on."""
    with e.loop(e.floordiv(size, 2 * LANES)) as j:
        e.store(inputs, e.reinterpret("int32", e.load(x, row, j * (2 * LANES), lanes=2 * LANES), LANES), at + j * LANES, lanes=LANES)


def keep_words(words: Any, value: Any, at: Any) -> None:
    """16 float32, rounded, as 8 words from words[at] on."""
    low, high = (e.let(e.shuffle(value, value, [2 * (i % 8) + half for i in range(LANES)])) for half in range(2))
    e.store(words, e.part(e.let(t.bfloat16_pairs(low, high)), 0, LANES // 2), at, lanes=LANES // 2)


class Dot(Pairs, Fma):
    """Words of two, as for tiles; their products as those of vectors.

    Of one row a word of weights is an instruction's sixteenth, and of a unit of 16 lanes a whole one, however many of them are empty.
    """

    few = 8
    text = DOT.read_text()

    def __init__(self, a: ExpertsArguments, how: ExpertsLayout) -> None:
        super().__init__(a, how)
        self.depth = 2 * LANES

    def _multiply(self, weight: Any, rows: list[Any], inputs: Any, width: Any, unit: Any, many: int, at: int) -> None:
        sums = [[e.Register(LANES, e.broadcast(e.zero(), LANES)) for _ in range(many)] for _ in rows]
        starts, rows = [e.wide((unit + v) * self.size(width)) for v in range(many)], [e.wide(row) for row in rows]
        with e.loop(e.floordiv(width, 2)) as pair:
            column = e.wide(pair)
            values = [e.let(e.load(inputs, start + column * LANES, lanes=LANES)) for start in starts]
            for row, totals in zip(rows, sums, strict=True):
                word = e.let(e.broadcast(e.load(weight, row, column), LANES))
                for value, total in zip(values, totals, strict=True):
                    total.set(e.external(total.dtype, "dot_bf16", total.get(), value, word))
        for n, totals in enumerate(sums):
            for v, total in enumerate(totals):
                e.store(self.finished, total.get(), at + (v * LANES + n) * LANES, lanes=LANES)

    def copy_rows(self, order: Order, packed: Any, unit: Any) -> None:
        with e.loop(order.filled(unit)) as i:
            at = e.opaque(unit * self.size(self.a.K) + i * self.length(self.a.K))
            copy_words(packed, at, self.a.x, e.let(e.floordiv(order.place(unit, i), self.a.k)), self.a.K)

    def length(self, width: Any) -> Any:
        return e.floordiv(width, 2)

    def row_products(self, weight: Any, rows: list[Any], inputs: Any, at: Any, size: Any) -> Any:
        return dots(weight, rows, inputs, at, size)

    def keep_row(self, hidden: Any, value: Any, at: Any) -> None:
        keep_words(hidden, value, at)
