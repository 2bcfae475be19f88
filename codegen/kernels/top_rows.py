"""The largest numbers of each row, largest first, and where they stand; or the smallest, smallest first. As many as there are is sorting.

A heap of the row, from which they are taken one after the other: in the order of numbers, of equal ones the first place first; no number is the
largest of all.

Bound by: nothing that vectors or other cores than its own would make faster; rows are few, or short.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e


@dataclass(frozen=True)
class TopRows:
    """How: the largest or the smallest; rows on several threads or on the caller's alone."""

    largest: bool
    workers: int
    name = "top_rows"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K] float32, values [M, k] float32, places [M, k] int64), k <= K."""
        return e.function("main", lambda: _body(self))


def _body(how: TopRows) -> None:
    M, K, k = (e.int32() for _ in range(3))
    x, values, places = e.argument((M, K), "float32"), e.argument((M, k), "float32"), e.argument((M, k), "int64")
    with e.loop(M, parallel=how.workers > 1) as m:
        heap = SimpleNamespace(numbers=e.scratch(K, "float32"), places=e.scratch(K, "int32"), at=e.stack(1, "int32"), size=e.stack(1, "int32"))
        with e.loop(K) as i:
            e.store(heap.numbers, e.load(x, m, i), i)
            e.store(heap.places, i, i)
        e.store(heap.size, K, 0)
        half = e.let(tirx.truncdiv(K, 2))
        with e.loop(half) as i:
            _sink(how, heap, half - 1 - i)
        with e.loop(k) as i:
            e.store(values, e.load(heap.numbers, 0), m, i)
            e.store(places, e.cast("int64", e.load(heap.places, 0)), m, i)
            last = e.opaque(e.load(heap.size, 0) - 1)
            e.store(heap.size, last, 0)
            e.store(heap.numbers, e.load(heap.numbers, last), 0)
            e.store(heap.places, e.load(heap.places, last), 0)
            _sink(how, heap, tirx.const(0, "int32"))


def _sink(how: TopRows, heap: Any, start: Any) -> None:
    """Exchange an entry with the first of those below it, until none of them comes before it."""
    e.store(heap.at, start, 0)
    with e.builder.While(2 * e.load(heap.at, 0) + 1 < e.load(heap.size, 0)):
        at, size = e.opaque(e.load(heap.at, 0)), e.opaque(e.load(heap.size, 0))
        left, right = e.opaque(2 * at + 1), e.opaque(e.minimum(2 * at + 2, size - 1))
        below = e.opaque(e.either(_comes_before(how, heap, right, left), right, left))

        def exchange(at: Any = at, below: Any = below) -> None:
            for held in (heap.numbers, heap.places):
                one, other = e.let(e.load(held, at)), e.let(e.load(held, below))
                e.store(held, other, at)
                e.store(held, one, below)
            e.store(heap.at, below, 0)

        e.choose(_comes_before(how, heap, below, at), exchange, lambda size=size: e.store(heap.at, size, 0))  # type: ignore[misc]


def _comes_before(how: TopRows, heap: Any, one: Any, other: Any) -> Any:
    """Does an entry come before another?"""
    (a, b), (i, j) = ([e.let(e.load(held, at)) for at in (one, other)] for held in (heap.numbers, heap.places))
    none, other_none = (_is_no_number(value) for value in (a, b))
    larger = tirx.Or(a > b, e.both(none, tirx.Not(other_none)))
    smaller = tirx.Or(b > a, e.both(other_none, tirx.Not(none)))
    first, last = (larger, smaller) if how.largest else (smaller, larger)
    return tirx.Or(first, e.both(tirx.Not(last), i < j))


def _is_no_number(value: Any) -> Any:
    """By its bits: that a number equals itself TVM believes of all of them."""
    bits = e.reinterpret("int32", value) & e.constant(0x7FFFFFFF, "int32")
    return e.let(bits > e.constant(0x7F800000, "int32"))
