"""What attend_dense.py reads and multiplies: float32, or words of two bfloat16 by one instruction (AVX512_BF16, Arm's BFDOT).

Words hold two neighbours of the width of a query and a key, or the shares of two keys and a column of their values. Each product is exact, sums are
float32, and shares are rounded to bfloat16 as torch rounds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen import emit_tiles
from sparsify_compiler.codegen.kernels.powers import exp2
from sparsify_compiler.codegen.vectors import AVX512, Vectors


class Floats:
    """float32. Queries are scaled, so that scores are powers of two, as they are packed."""

    of, word = 1, "float32"

    def text(self, lanes: int) -> AbstractContextManager[Any]:
        return nullcontext()

    def room(self, how: Any, t: Any, keys: int) -> None:
        t.shares = t.scores

    def load(self, buffer: Any, *place: Any, lanes: int = 1) -> Any:
        """Words of a row of queries or keys, the last of `place` counts words."""
        return e.load(buffer, *place, lanes=lanes)

    def number(self, elements: Any, at: Any) -> Any:
        """A word of neighbours among all elements of a tensor."""
        return e.load(elements, at)

    def query(self, words: Any, factor: float, lanes: int) -> Any:
        return words * e.broadcast(e.constant(factor, "float32"), lanes)

    def score(self, total: Any, factor: float, lanes: int) -> Any:
        return total

    def multiply_add(self, total: e.Register, words: Any, number: Any) -> None:
        total.multiply_add(words, number)

    def keep_shares(self, how: Any, t: Any, start: int, top: Any, total: e.Register) -> None:
        """Scores of the rows from `start` on become 2 ** (score - top), and are added up."""
        with e.loop(t.count) as key:
            at = e.opaque(key * how.rows + start)
            share = exp2(e.load(t.scores, at, lanes=how.lanes) - top, how.lanes)
            total.set(total.get() + share)
            e.store(t.scores, share, at, lanes=how.lanes)

    def values(self, how: Any, a: Any, t: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
        """Where words of values are from a column on, by step: of a block, here where they lie."""
        start = a.value.place(t.batch, t.group, t.key)
        return lambda step, column: (a.values_flat, e.let(start + e.cast("int64", step) * e.cast("int64", a.value.step) + e.cast("int64", column)))


class Pairs:
    """Words of two bfloat16: scores are scaled, the queries' words are as they are."""

    of, word = 2, "int32"

    def text(self, lanes: int) -> AbstractContextManager[Any]:
        return e.llvm(Vectors(by_element=lanes != AVX512.lanes).dot)  # type: ignore[no-any-return]

    def room(self, how: Any, t: Any, keys: int) -> None:
        t.shares, t.values = e.scratch(keys // 2 * how.rows, "int32"), e.scratch(keys // 2 * how.value_width, "int32")

    def load(self, buffer: Any, *place: Any, lanes: int = 1) -> Any:
        *outer, word = place
        return e.reinterpret("int32", e.load(buffer, *outer, word * 2, lanes=2 * lanes), lanes)

    def number(self, elements: Any, at: Any) -> Any:
        return e.reinterpret("int32", e.load(elements, at, lanes=2))

    def query(self, words: Any, factor: float, lanes: int) -> Any:
        return words

    def score(self, total: Any, factor: float, lanes: int) -> Any:
        return total * e.broadcast(e.constant(factor, "float32"), lanes)

    def multiply_add(self, total: e.Register, words: Any, number: Any) -> None:
        total.set(e.external(total.dtype, "dot_bf16", total.get(), words, number))

    def keep_shares(self, how: Any, t: Any, start: int, top: Any, total: e.Register) -> None:
        lanes = how.lanes
        with e.when(tirx.EQ(t.count % 2, 1)):   # the last pair has one key
            e.store(t.scores, e.broadcast(e.constant(-math.inf, "float32"), lanes), t.count * how.rows + start, lanes=lanes)
        with e.loop(self.steps(t)) as step:
            shares = []
            for half in range(2):
                shares.append(exp2(e.load(t.scores, (step * 2 + half) * how.rows + start, lanes=lanes) - top, lanes))
                total.set(total.get() + shares[-1])
            made = emit_tiles.bfloat16_pairs(*shares) if lanes == AVX512.lanes else e.rounded_pairs(*shares, lanes)
            e.store(t.shares, made, step * how.rows + start, lanes=lanes)

    def values(self, how: Any, a: Any, t: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
        """values[two keys][column] of a block, packed."""
        lanes = how.lanes
        with e.loop(self.steps(t)) as step:
            key = e.opaque(t.key + step * 2)
            places = [a.value.at(t.batch, t.group, one) for one in (key, e.opaque(e.minimum(key + 1, a.keys - 1)))]
            both = e.broadcast(step * 2 + 1 < t.count, lanes)
            with e.loop(how.value_width // lanes) as some:
                low, high = (e.let(e.reinterpret("uint16", e.load(a.value.buffer, *place, some * lanes, lanes=lanes), lanes)) for place in places)
                high = tirx.Select(both, high, e.broadcast(e.constant(0, "uint16"), lanes))
                e.store(t.values, e.pair(low, high, lanes), step * how.value_width + some * lanes, lanes=lanes)
        return lambda step, column: (t.values, e.let(step * how.value_width + column))

    def steps(self, t: Any) -> Any:
        return tirx.truncdiv(t.count + 1, 2)


def operand(lie: str, sizes: tuple[Any, Any, Any, Any], dtype: str) -> Any:
    """The next parameter, [batch, heads, places, width] as it lies: `buffer`, and at(batch, head, place).

    And place(batch, head, place), of a row's first element among all, and `step`, from there to the next place: for loops that read several rows.
    """
    batch, heads, places, width = sizes
    turned = lie == "bshd"
    buffer = e.argument((batch, places, heads, width) if turned else (batch, heads, places, width), dtype)

    def place(b: Any, h: Any, s: Any) -> Any:
        outer, middle, inner = (places, s, h) if turned else (heads, h, s)
        row = (e.wide(b) * e.cast("int64", outer) + e.cast("int64", middle)) * e.cast("int64", heads if turned else places) + e.cast("int64", inner)
        return e.scalar(row * e.cast("int64", width))

    return SimpleNamespace(buffer=buffer, at=lambda b, h, s: (b, s, h) if turned else (b, h, s), place=place, step=heads * width if turned else width)


def flat(buffer: Any) -> Any:
    """The elements of a parameter as one row."""
    return e.builder.decl_buffer((math.prod(buffer.shape),), str(buffer.dtype), data=buffer.data, align=2 if "16" in str(buffer.dtype) else 4)


NUMBERS = {"float32": Floats(), "bfloat16": Pairs()}
