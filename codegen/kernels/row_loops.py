"""Loops that graphs without torch need beside those of layers: rows or runs of elements, divided among threads where that pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsify_compiler.codegen import emit as e

LANES = 16
ALONE = 16_384      # elements below which waking other threads costs more than they bring (about 3 µs)


def each(count: Any, size: Any, workers: int, body: Callable[[Any], None]) -> None:
    """body(i) for i < count, on several threads where count things of that many elements each are worth it."""
    def alone() -> None:
        with e.loop(count) as i:
            body(i)

    def together() -> None:
        with e.loop(workers, parallel=True) as me:
            first, last = (e.let(e.floordiv((me + i) * count, workers)) for i in range(2))
            with e.loop(last - first) as i:
                body(e.let(first + i))

    if workers == 1:
        return alone()
    return e.choose(count * size < ALONE, alone, together)


def over_row(size: int, vectors: Callable[[list[Any]], None], single: Callable[[Any], None], together: int = 4) -> None:
    """Go through a row of `size` elements: vectors([places]) for `together` vectors at a time, then one at a time; single(place) for those left."""
    step = together * LANES
    if size >= step:
        with e.loop(size // step) as i:
            start = e.let(i * step)
            vectors([start + v * LANES for v in range(together)])
    first = size // step * step
    vectors_left = (size - first) // LANES
    if vectors_left:
        vectors([e.constant(first + v * LANES, "int32") for v in range(vectors_left)])
    first += vectors_left * LANES
    if size > first:
        with e.loop(size - first) as i:
            single(e.let(i + first))
